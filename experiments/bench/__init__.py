"""`specdec bench`: specdec against `transformers`' own ways to generate, alternating in one process."""
