// The same request as a command and as a program. A key is named, never written out.

import { requestBody } from "./api.js";

/** A curl command that writes picture.png. */
export function curlCommand(settings, origin, withKey) {
  const lines = [
    `curl -sS --fail-with-body ${origin}/v1/images/generations`,
    "-H 'Content-Type: application/json'",
    "-H 'Accept: image/png'",
    ...(withKey ? ['-H "Authorization: Bearer $FEWSTEP_API_KEY"'] : []),
    `-d ${quoted(requestBody(settings))}`,
    "-o picture.png",
  ];
  return lines.join(" \\\n  ");
}

/** A Python program over the openai client that writes picture.png. */
export function pythonProgram({ prompt, model, size, nfe, seed }, origin, withKey) {
  return `import base64
${withKey ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${withKey ? 'os.environ["FEWSTEP_API_KEY"]' : '"none"'})
answer = client.images.generate(
    model=${JSON.stringify(model)},
    prompt=${JSON.stringify(prompt)},
    size=${JSON.stringify(size)},
    extra_body={"seed": ${seed}, "num_inference_steps": ${nfe}},
)
open("picture.png", "wb").write(base64.b64decode(answer.data[0].b64_json))`;
}

/** A word of a POSIX shell that means exactly this text. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
