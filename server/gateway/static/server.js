// How every part of the page asks the server, and what it makes of errors and of events.

const UNREACHABLE = "The server cannot be reached. Is it still running?";

/** An answer that is an error, in the server's own words; status is absent where there was no answer. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The served students, the default one first. */
export async function listStudents(key) {
  return (await askJson("/v1/models", { key })).data;
}

/** An answer that is no error. no-store: the waterfall is about work that was done, not about a cache. */
export async function ask(path, { key, headers = {}, ...options } = {}) {
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await reachable(fetch(path, { ...options, headers: { ...authorization, ...headers }, cache: "no-store" }));
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered ${answer.status} and did not say why.`, answer.status);
}

/** The JSON of an answer. */
export async function askJson(path, options) {
  const answer = await ask(path, options);
  return readJson(await reachable(answer.text()));
}

/** Options of `ask` that send these settings as JSON. */
export function asJson(settings) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: requestBody(settings) };
}

/** The JSON of a request. A seed may have 64 bits, more than a number here holds, so its digits are written as they are. */
export function requestBody({ prompt, model, size, nfe, seed, ...more }) {
  const fields = JSON.stringify({ model, prompt, size, num_inference_steps: nfe, ...more });
  return `${fields.slice(0, -1)},"seed":${seed}}`;
}

/** Parses server-sent events: the JSON of each event's data, in order. */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reachable(reader.read());
    if (done) return;
    const events = (waiting + value).split(/\r?\n\r?\n/);
    waiting = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length && data[0] !== "[DONE]") yield readJson(data.join("\n"));
    }
  }
}

/** The counterpart of requestBody: seeds stay decimal digits. In a JSON string the quotes of `"seed":` would be escaped. */
function readJson(text) {
  return JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));
}

/** What a browser calls a TypeError is a connection that failed. */
async function reachable(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(UNREACHABLE) : error;
  }
}
