"""A target that two processes hold together: the first decides, one broadcast a step, and the ranks never part."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import target
from source_files import ROOT

Found = dict[str, Any]

SAME_AS_ONE = (
    "nothing drafted", "n-grams", "a draft model", "a drafted tree", "sampled", "coupled", "a batch", "pages",
    "sequences", "scores", "own processor", "planned", "NaN", "NaN in a batch",
)  # fmt: skip
PLANTED = ("another seed", "global generator", "drafter on one rank", "other logits", "other stop rules")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What `rank_worker.py` wrote on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    model = copy.deepcopy(target("llama-bias", "fp32"))
    model.save_pretrained(folder / "model")
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "rank_worker.py"), str(folder / "model"), str(folder)]
    running = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=240)[0] for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    assert [one.returncode for one in running] == [0, 0], "\n".join(said)
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_the_text_is_that_of_one_process_on_all_ranks(ranks: list[Found], name: str) -> None:
    first, second = (found[name] for found in ranks)
    assert first["text"] == first["wanted"]
    assert second["text"] == first["text"]
    assert first.get("apart", 0.0) < 1e-3


def test_greedy_text_is_plain_generates(ranks: list[Found]) -> None:
    assert ranks[0]["a draft model"]["text"] == ranks[0]["plain"]["text"] == ranks[1]["plain"]["text"]


@pytest.mark.parametrize("name", [name for name in (*SAME_AS_ONE, *PLANTED) if "NaN" not in name and name != "planned"])
def test_one_broadcast_a_step(ranks: list[Found], name: str) -> None:
    """And one that opens the call, and the last step's verdict."""
    for found in ranks:
        assert found[name]["broadcasts"] == found[name]["steps"] + 2
    assert ranks[0][name]["steps"] == ranks[1][name]["steps"]


@pytest.mark.parametrize("name", PLANTED)
def test_what_differs_between_ranks_does_not_part_them(ranks: list[Found], name: str) -> None:
    assert ranks[0][name]["text"] == ranks[1][name]["text"]
    assert ranks[0][name]["drafted"] == ranks[1][name]["drafted"] > 0


def test_ranks_that_decide_by_themselves_part(ranks: list[Found]) -> None:
    assert ranks[0]["alone"] != ranks[1]["alone"]


def test_planted_differences_would_make_a_difference(ranks: list[Found]) -> None:
    """A stop rule of the second rank alone, and its logits, decide nothing."""
    assert len(ranks[0]["other stop rules"]["text"][0]) == 12
    assert ranks[0]["other logits"]["text"] == ranks[0]["drafter on one rank"]["text"]


def test_the_first_rank_plans(ranks: list[Found]) -> None:
    assert ranks[0]["planned again"]["text"] == ranks[1]["planned again"]["text"]
    assert [found["planned again"]["asked"] for found in ranks] == [
        3,
        0,
    ]  # the first rank's call on a whole target, too
    for found in ranks:
        assert found["planned again"]["broadcasts"] == found["planned again"]["steps"] + 2  # nothing is measured again
        assert found["planned"]["broadcasts"] > found["planned"]["steps"] + 2
        assert not any("not planned" in note for note in found["planned"]["notes"])


def test_the_callers_code_runs_on_every_rank_as_plain_generate_has_it(ranks: list[Found]) -> None:
    assert [found["own processor"]["calls"] for found in ranks] == [20, 20]
    for found in ranks:
        assert found["streamed"]["streamed"] == found["streamed"]["text"][0]
        assert found["streamed"]["ended"]


def test_nan_beside_the_text_is_decoded_around_on_all_ranks(ranks: list[Found]) -> None:
    assert any("NaN" in note for note in ranks[0]["NaN"]["notes"])
    for name in ("NaN", "NaN in a batch"):
        assert ranks[0][name]["broadcasts"] == ranks[1][name]["broadcasts"] > ranks[0][name]["steps"] + 2


def test_a_rank_that_follows_says_so(ranks: list[Found]) -> None:
    assert any("rank 1 of 2" in note for note in ranks[1]["sampled"]["notes"])
    assert not any("rank" in note for note in ranks[0]["sampled"]["notes"])


def test_other_arguments_are_refused_on_all_ranks_before_anything_runs(ranks: list[Found]) -> None:
    for found in ranks:
        assert found["other arguments"].startswith("UnsupportedArgumentError: max_new_tokens and max_length: expected")


def test_where_the_first_rank_fails_the_others_are_told(ranks: list[Found]) -> None:
    assert ranks[0]["one fails"] == 'KeyError: "a caller\'s own mistake"'
    assert ranks[1]["one fails"].startswith("LeadingRankError: the first rank, which decides for all, failed: KeyError")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("self", "draft: self runs on all ranks"),
        ("sharded draft", "the first rank alone drafts"),
        ("strict", "use exactness='distribution'"),
        ("engine", "Engine: expected a target that this process holds whole"),
    ],
)
def test_what_cannot_work_is_refused_in_words(ranks: list[Found], name: str, words: str) -> None:
    for found in ranks:
        assert found[name].startswith("UnsupportedArgumentError")
        assert words in found[name]
