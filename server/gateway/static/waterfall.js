// Where the milliseconds of an answer went, stage after stage.

import { make, milliseconds } from "./dom.js";

/** Shows {timings, previews: whether there were any, encoder: its stage's name, seen: milliseconds from here, if known}, or
 * with null that there is nothing yet. */
export function showWaterfall(panel, measured) {
  panel.at("waterfall").hidden = measured === null;
  panel.at("timing-empty").hidden = measured !== null;
  const seen = measured?.seen && `Seen from this page, network included: ${milliseconds(measured.seen)}\u00a0ms.`;
  panel.at("seen").textContent = seen ?? "";
  if (measured === null) return;
  const { timings } = measured;
  let begun = 0;
  const rows = stagesOf(measured).map(([name, ms, kind]) => {
    const row = stageRow(name, ms, kind, begun / timings.total, ms / timings.total);
    begun += ms;
    return row;
  });
  panel.at("stages").replaceChildren(...rows);
  panel.at("total").replaceChildren(stageRow("Total", timings.total, "whole", 0, 1));
  panel.at("total").querySelector(".ms").append("\u00a0ms");
}

/** What the server calls queue is all that is no named stage: previews too, where they were asked for. */
function stagesOf({ previews, encoder, timings: { queue, text_encoder, steps, vae_decoder, image_encode } }) {
  return [
    [previews ? "Queue, previews" : "Queue", queue, "waiting"],
    ["Text encoder", text_encoder, "fixed"],
    ...steps.map((ms, index) => [`NFE ${index + 1}`, ms, "step"]),
    ["VAE decoder", vae_decoder, "fixed"],
    [encoder, image_encode, "fixed"],
  ];
}

function stageRow(name, ms, kind, from, share) {
  const bar = make("span", { className: `bar ${kind}` });
  bar.style.setProperty("--from", from);
  bar.style.setProperty("--share", share);
  const track = make("td", { className: "track", "aria-hidden": "true" }, bar);
  return make("tr", {}, make("th", { scope: "row" }, name), track, make("td", { className: "ms" }, milliseconds(ms)));
}
