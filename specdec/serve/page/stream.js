// Talks to the server: what it offers, and streams of tokens. Everything that fails does so as a Failure in words.

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const HINTS = {
  401: "This server asks for an API key: enter one below.",
  403: "This API key may not be used here.",
  408: "The server waited too long for the request.",
  413: "The message is too long for this server.",
  429: "The server is busy: try again in a moment.",
  503: "The server takes no more requests just now: try again in a moment.",
};

async function ask(path, key, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    // no body of the API's own: the status has to do
  }
  const hint = HINTS[response.status] ?? (said ? "" : `The server answered ${response.status} ${response.statusText}.`);
  throw new Failure([hint, said && response.status !== 401 ? said : ""].filter(Boolean).join(" "), response.status);
}

/** What this server offers: {model, drafters, chat_template, max_new_tokens, ...}. */
export async function describe(key) {
  return (await ask("specdec/info", key)).json();
}

/** The objects of one streamed answer, as they come; ends after [DONE]. */
export async function* chunks(path, body, key, signal) {
  const response = await ask(path, key, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new Failure("The answer broke off: the connection to the server was lost.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (!data.length) continue; // a comment that keeps the connection open
      const text = data.map((line) => line.slice(5).trimStart()).join("\n");
      if (text === "[DONE]") return;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new Failure(chunk.error.message ?? "The server failed in the middle of the answer.");
      yield chunk;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { done: true };
  }
}
