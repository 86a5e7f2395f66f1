// The server, asked. Paths are relative to the page, so that a proxy may put a prefix before them.

const KEY = "lorary-token";

/** What the server refused, or that it could not be reached. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfterS = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

// For this tab only, and never in a cookie: no other page can make the browser send it.
export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = {};
  try {
    said = (await response.json()).error ?? {};
  } catch {
    // A proxy's page, not this server's answer: the status says what there is to say.
  }
  return new ApiError(said.message ?? `The server answered ${response.status}.`, {
    status: response.status,
    code: said.code,
    retryAfterS: Number(response.headers.get("retry-after") ?? 0),
  });
}

/** Return what the console's own API answers; with a body, it is a POST. */
export async function ask(path, options) {
  const response = await request(`api/${path}`, options);
  try {
    return await response.json();
  } catch {
    throw new ApiError("The answer was cut short, or is not this server's.");
  }
}

/** Yield the head of a stream of OpenAI's API as {headers}, then each of its events as {event}. */
export async function* stream(path, body, signal) {
  const response = await request(`../v1/${path}`, { body, signal });
  yield { headers: response.headers };
  for await (const data of dataOf(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, { code: event.error.code });
    yield { event };
  }
  throw new ApiError("The stream broke off before its end.");
}

/** Yield the data of server-sent events; a character or a line may be cut anywhere between two reads. */
async function* dataOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) yield line.slice("data: ".length).trimEnd();
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
