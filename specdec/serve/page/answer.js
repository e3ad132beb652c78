// One answer on the page: its tokens, each marked by where it came from, and what it took to make them.

const ORIGINS = {
  drafted: "drafted, and kept",
  recovered: "recovered: the model's own, where it refused a guess",
  bonus: "bonus: the model's own, behind guesses that were all kept",
  plain: "plain: nothing was guessed",
};

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export class Answer {
  /** heading: what is said above it, "" for nothing. */
  constructor(heading) {
    this.text = "";
    this.finished = false;
    this.counts = { drafted: 0, recovered: 0, bonus: 0, plain: 0 };
    this.numTokens = this.numPasses = 0;
    this.began = performance.now();
    this.shown = 0; // characters that lie in token spans

    this.node = element("div", "answer");
    if (heading) this.node.append(element("h3", "", heading));
    this.body = element("div", "text");
    this.body.setAttribute("aria-busy", "true");
    this.pending = element("span", "pending");
    this.caret = element("span", "caret");
    this.body.append(this.pending, this.caret);
    this.bar = element("div", "bar");
    this.bar.setAttribute("role", "img");
    this.parts = Object.fromEntries(Object.keys(ORIGINS).map((origin) => [origin, element("i", origin)]));
    this.bar.append(...Object.values(this.parts));
    this.figures = element("p", "figures");
    this.node.append(this.body, this.bar, this.figures);
  }

  get tokensPerPass() {
    return this.numPasses ? this.numTokens / this.numPasses : 0;
  }

  /** One chunk of the stream; true where it showed something. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    const told = chunk.specdec;
    this.text += piece;
    if (told?.tokens?.length) this.#show(told.tokens, told.step);
    if (told) this.numPasses = Math.max(this.numPasses, choice?.finish_reason ? told.step : told.step + 1); // no pass ends
    if (chunk.usage?.specdec) this.#count(chunk.usage.specdec);
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    this.pending.textContent = this.text.slice(this.shown); // out already, though its token is not yet whole
    this.#tell();
    return Boolean(piece || told?.tokens?.length);
  }

  #show(tokens, step) {
    const now = performance.now();
    const pass = element("span", "pass");
    for (const { text, origin } of tokens) {
      if (origin in this.counts) this.counts[origin] += 1;
      this.shown += text.length;
      if (!text) continue; // a part of a character, which the next token completes
      const token = element("span", `token ${origin}`, text);
      token.title = `${ORIGINS[origin] ?? origin} · pass ${step + 1}`;
      pass.append(token);
    }
    this.body.insertBefore(pass, this.pending);
    this.numTokens += tokens.length;
    if (this.first === undefined) [this.first, this.ahead] = [now, tokens.length];
    this.last = now;
  }

  #count({ steps, draft_tokens, accepted_tokens }) {
    this.numPasses = steps;
    if (draft_tokens) this.kept = accepted_tokens / draft_tokens;
  }

  #tell() {
    for (const [origin, part] of Object.entries(this.parts)) {
      part.hidden = !this.counts[origin];
      part.style.flexGrow = this.counts[origin];
    }
    if (!this.numTokens) return;
    const some = Object.entries(this.counts).filter(([, count]) => count);
    this.bar.title = some.map(([origin, count]) => `${count} ${origin}`).join(", ");
    this.bar.setAttribute("aria-label", this.bar.title);
    const seconds = (this.last - this.first) / 1000;
    const rows = [[this.tokensPerPass.toFixed(2), "tokens per pass"]];
    if (seconds > 0.05) rows.push([((this.numTokens - this.ahead) / seconds).toFixed(1), "tokens/s"]);
    if (this.kept !== undefined) rows.push([`${Math.round(100 * this.kept)} %`, "of drafts kept"]);
    rows.push([String(this.numTokens), `tokens in ${this.numPasses} ${this.numPasses === 1 ? "pass" : "passes"}`]);
    rows.push([`${((this.first - this.began) / 1000).toFixed(2)} s`, "to first token"]);
    this.figures.replaceChildren(
      ...rows.map(([value, what]) => {
        const figure = element("span");
        figure.append(element("b", "", value), ` ${what}`);
        return figure;
      }),
    );
  }

  /** No more comes. note: why, where it did not end by itself; isError: said so that nobody misses it. */
  finish(note = "", isError = false) {
    this.finished = true;
    this.caret.remove();
    this.body.setAttribute("aria-busy", "false");
    const why = note || (this.reason === "length" ? "cut at max tokens: see the settings" : "");
    if (!why) return;
    const told = element("p", isError ? "note error" : "note", why);
    if (isError) told.setAttribute("role", "alert");
    this.body.after(told);
  }
}
