// The same requests as commands and as programs. A key is named, never written out.

import { requestBody } from "./server.js";

/** A curl command that writes picture.png. */
export function curlCommand(settings, origin, withKey) {
  return curl(`${origin}/v1/images/generations`, ["-H 'Accept: image/png'"], settings, withKey, "picture.png");
}

/** A curl command that waits for the video and writes video.mp4. */
export function videoCurlCommand(settings, origin, withKey) {
  return curl(`${origin}/v1/videos/sync`, [], settings, withKey, "video.mp4");
}

function curl(url, headers, settings, withKey, file) {
  const lines = [
    `curl -sS --fail-with-body ${url}`,
    "-H 'Content-Type: application/json'",
    ...headers,
    ...(withKey ? ['-H "Authorization: Bearer $FEWSTEP_API_KEY"'] : []),
    `-d ${quoted(requestBody(settings))}`,
    `-o ${file}`,
  ];
  return lines.join(" \\\n  ");
}

/** A Python program over the openai client that writes picture.png. */
export function pythonProgram(settings, origin, withKey) {
  return `import base64
${client(origin, withKey)}
answer = client.images.generate(
${fieldsOf(settings)}
)
open("picture.png", "wb").write(base64.b64decode(answer.data[0].b64_json))`;
}

/** A Python program over the openai client that makes a job, waits for it and writes video.mp4. */
export function videoPythonProgram(settings, origin, withKey) {
  return `${client(origin, withKey).trimStart()}
video = client.videos.create_and_poll(
${fieldsOf(settings)}
)
if video.error:
    raise SystemExit(video.error.message)
client.videos.download_content(video.id).write_to_file("video.mp4")`;
}

function client(origin, withKey) {
  return `${withKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${withKey ? 'os.environ["FEWSTEP_API_KEY"]' : '"none"'})`;
}

function fieldsOf({ prompt, model, size, nfe, seed }) {
  return `    model=${JSON.stringify(model)},
    prompt=${JSON.stringify(prompt)},
    size=${JSON.stringify(size)},
    extra_body={"seed": ${seed}, "num_inference_steps": ${nfe}},`;
}

/** A word of a POSIX shell that means exactly this text. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
