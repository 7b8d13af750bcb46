// What the page asks of the server: students, and pictures as a stream or at once.

const GENERATIONS = "/v1/images/generations";
const UNREACHABLE = "The server cannot be reached. Is it still running?";

/** An answer that is an error, in the server's own words. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The served students that make pictures, the default one first. */
export async function listStudents(key) {
  const answer = await ask("/v1/models", { headers: authorization(key) });
  return (await answer.json()).data.filter((student) => student.media_type === "image");
}

/**
 * One picture with its previews. settings: {prompt, model, size, nfe, seed}, seed in decimal digits;
 * onPreview hears (data URL of a PNG, the NFE it follows). Returns {picture: data URL, timings, fingerprint}.
 */
export async function streamPicture(settings, { key, signal, onPreview }) {
  const answer = await post({ ...settings, stream: true, partial_images: 3 }, key, signal);
  for await (const event of readEvents(answer.body)) {
    if (event.error) throw new ApiError(event.error.message, answer.status);
    if (event.type === "image_generation.partial_image") onPreview(png(event.b64_json), event.step);
    if (event.type === "image_generation.completed") return finished(event.b64_json, event);
  }
  throw new ApiError("The server ended its answer before the picture was complete. Try again.", answer.status);
}

/** One picture without previews; the same result as streamPicture. */
export async function makePicture(settings, { key, signal }) {
  const answer = await (await post(settings, key, signal)).json();
  return finished(answer.data[0].b64_json, answer);
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
      if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}

function post(fields, key, signal) {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  return ask(GENERATIONS, { method: "POST", headers, body: requestBody(fields), signal });
}

/** An answer that is no error. no-store: the waterfall is about work that was done, not about a cache. */
async function ask(path, options) {
  const answer = await reachable(fetch(path, { ...options, cache: "no-store" }));
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered ${answer.status} and did not say why.`, answer.status);
}

/** What a browser calls a TypeError is a connection that failed. */
async function reachable(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(UNREACHABLE) : error;
  }
}

function finished(b64, { timings, fingerprint }) {
  return { picture: png(b64), timings, fingerprint };
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function png(b64) {
  return `data:image/png;base64,${b64}`;
}
