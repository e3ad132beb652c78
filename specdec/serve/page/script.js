// The page: a conversation, its settings, and answers that stream in one or two columns.
import { Answer, element } from "./answer.js";
import { Failure, chunks, describe } from "./stream.js";

const $ = (id) => document.getElementById(id);
const NONE = "none"; // the drafter's name that means plain decoding
const KEY = "specdec-key";
const EXAMPLES = {
  chat: ["Explain rain to a child, in five sentences.", "Write a haiku about checking one's work.", "List the planets, one a line."],
  text: ["def read(", "class Node:\n    def __init__(self", "import os\nimport"],
};
let server = { model: "", drafters: [], chat_template: true }; // see describe()
let messages = []; // what was said so far, as the API takes it
let running = null; // the AbortController of the answers that are on their way

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

async function connect() {
  try {
    server = await describe(key());
  } catch (failure) {
    complain(failure);
    $("model").textContent = "not connected";
    return;
  }
  quiet();
  $("model").textContent = server.model;
  document.title = `${server.model} · specdec`;
  document.body.classList.toggle("continues", !server.chat_template);
  $("prompt").placeholder = server.chat_template ? "Ask something" : "Begin a text";
  const names = [...server.drafters.filter((name) => name !== NONE), NONE];
  $("draft").replaceChildren(...names.map((name) => new Option(name === NONE ? "no drafts" : name, name)));
  $("max-tokens").max = server.max_new_tokens;
  $("max-tokens").value = Math.min($("max-tokens").value, server.max_new_tokens);
  $("draft").parentElement.hidden = false;
  offer();
  $("examples").replaceChildren(
    ...EXAMPLES[server.chat_template ? "chat" : "text"].map((text) => {
      const button = element("button", "example", text);
      button.type = "button";
      button.addEventListener("click", () => send(text));
      return button;
    }),
  );
}

/** There is something to compare with only where there are drafts. */
function offer() {
  $("compare").disabled = $("draft").value === NONE;
}

function words(failure) {
  if (failure instanceof Failure) return failure.message;
  console.error(failure);
  return "The server sent something this page cannot read.";
}

function complain(failure) {
  $("notice").textContent = words(failure);
  $("notice").hidden = false;
  if (failure.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
}

function quiet() {
  $("notice").hidden = true;
  $("key-row").hidden = true;
}

function number(id, otherwise) {
  const field = $(id);
  return field.value === "" || !field.checkValidity() ? otherwise : Number(field.value);
}

function body(draft, seed, text) {
  const asked = server.chat_template ? { messages } : { prompt: text };
  return {
    model: server.model,
    ...asked,
    draft,
    seed,
    stream: true,
    stream_options: { include_usage: true, specdec: true },
    temperature: number("temperature", 0),
    max_tokens: number("max-tokens", 256),
  };
}

async function stream(answer, asked, signal) {
  const path = server.chat_template ? "v1/chat/completions" : "v1/completions";
  try {
    for await (const chunk of chunks(path, asked, key(), signal)) if (answer.take(chunk)) follow();
    answer.finish();
  } catch (failure) {
    if (failure.name === "AbortError") return answer.finish("stopped");
    if (failure.status === 401) complain(failure);
    answer.failed = true;
    answer.finish(words(failure), true);
  }
}

async function send(text) {
  if (running || !text.trim()) return;
  if (!server.model) await connect(); // it may be there by now
  if (!server.model || running) return;
  const wrong = ["temperature", "max-tokens", "seed"].find((id) => !$(id).checkValidity());
  if (wrong) {
    $("settings").open = true;
    $(wrong).reportValidity();
    return;
  }
  quiet();
  const draft = $("draft").value || undefined;
  const both = $("compare").checked && !$("compare").disabled;
  const greedy = number("temperature", 0) === 0;
  const seed = number("seed", both && !greedy ? Math.floor(Math.random() * 2 ** 31) : undefined);
  messages.push({ role: "user", content: text });
  const answers = both ? [new Answer(`drafter: ${draft}`), new Answer("no drafts")] : [new Answer("")];
  const turn = element("article", both ? "turn both" : "turn");
  const columns = element("div", "columns");
  columns.append(...answers.map((answer) => answer.node));
  turn.append(element("p", "asked", text), columns);
  $("talk").append(turn);
  $("welcome").hidden = true;
  $("prompt").value = "";
  grow();
  busy(new AbortController());
  follow(true);
  const asked = [body(draft, seed, text), body(NONE, seed, text)];
  await Promise.all(answers.map((answer, i) => stream(answer, asked[i], running.signal)));
  if (both && answers.every((answer) => answer.reason)) turn.append(verdict(...answers, greedy));
  busy(null);
  settle(answers[0], text);
  follow();
}

/** What two answers say beside each other. */
function verdict(drafted, plain, greedy) {
  const same = drafted.text === plain.text;
  const said = same
    ? "Same text"
    : greedy
      ? "The texts part where two tokens are equally likely up to rounding"
      : "Two draws from one law: at temperature 0 the texts are the same";
  const note = element("p", same ? "verdict same" : "verdict");
  const times = drafted.tokensPerPass / plain.tokensPerPass;
  note.append(element("b", "", said), ` · ${times.toFixed(2)}× the tokens per pass`);
  note.append(element("br"), "The two share the server's passes while they run: for their true speed, ask for one at a time.");
  return note;
}

/** The conversation goes on from this answer; where there is none, the question is the user's again. */
function settle(answer, text) {
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  else messages.pop();
  if (answer.failed && !answer.text && !$("prompt").value) $("prompt").value = text;
  const figures = answer.figures.textContent;
  $("status").textContent = answer.failed ? "The answer failed." : `Answer complete: ${figures}`;
  grow();
  if (matchMedia("(hover: hover)").matches && $("key-row").hidden) $("prompt").focus();
}

function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("new").hidden = Boolean(running) || !$("talk").childElementCount;
  document.querySelector(".key").hidden = !$("talk").childElementCount;
  if (running) $("status").textContent = "The answer begins.";
}

/** Keep the end in sight, unless the reader has scrolled away from it. */
function follow(always = false) {
  const room = $("scroller");
  if (always || room.scrollHeight - room.scrollTop - room.clientHeight < 120) room.scrollTop = room.scrollHeight;
}

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("prompt").value);
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("prompt").value);
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else $("settings").open = false;
});
document.addEventListener("click", (event) => {
  if (!$("settings").contains(event.target)) $("settings").open = false;
});
$("draft").addEventListener("change", offer);
$("marks").addEventListener("change", () => document.body.classList.toggle("unmarked", !$("marks").checked));
$("new").addEventListener("click", () => {
  messages = [];
  $("talk").replaceChildren();
  $("welcome").hidden = false;
  busy(null);
  $("prompt").focus();
});
function useKey() {
  sessionStorage.setItem(KEY, $("key").value.trim());
  connect();
}
$("use-key").addEventListener("click", useKey);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  useKey();
});
connect();
