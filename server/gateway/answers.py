"""What is said about finished images: headers and the JSON document, in OpenAI's shape."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from server.gateway.json_answer import to_base64
from server.gateway.made import Made
from server.gateway.plan import Plan
from server.gateway.timings import Timings


def headers(plan: Plan, made: list[Made], timings: Timings) -> dict[str, str]:
    """x-pixel-sha256 is over uint8 [H, W, 3], whatever the file format; one per image."""
    return {
        "Server-Timing": timings.header(),
        "ETag": etag(plan),
        "Cache-Status": cache_status(plan, made),
        "x-seed": str(plan.seed),
        "x-fingerprint": made[0].fingerprint,
        "x-pixel-sha256": ", ".join(image.pixel_sha256 for image in made),
    }


def cache_status(plan: Plan, made: list[Made]) -> str:
    """RFC 9211: a hit only when every image is one; collapsed when equal requests shared the work."""
    origins = {image.origin for image in made}
    if origins == {"cached"}:
        return "fewstep; hit"
    why = "miss" if plan.reads_cache else "request" if plan.seeded else "bypass"
    return f"fewstep; fwd={why}" + ("; collapsed" if origins == {"shared"} else "")


def etag(plan: Plan) -> str:
    """Of all that decides the answer. Weak for JSON, which also says when it was made and how long that took."""
    indices = [plan.image_indices.start, plan.image_indices.stop]
    decides = [plan.student.fingerprint, plan.prompt, plan.seed, indices, plan.nfe, plan.size, plan.format]
    decides += [plan.compression, plan.embed_prompt, plan.raw, plan.url]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    return f'"{digest}"' if plan.raw else f'W/"{digest}"'


def document(plan: Plan, made: list[Made], timings: Timings, link: Callable[[bytes], str]) -> dict[str, Any]:
    """The answer in OpenAI's shape, and what it lacks to make the images again. link: bytes of a file -> its address."""
    kind, shown = ("url", link) if plan.url else ("b64_json", to_base64)
    return {
        "created": int(time.time()),
        "data": [
            {
                kind: shown(image.file.content),
                "seed": plan.seed,
                "image_index": image.image_index,
                "cached": image.origin == "cached",
            }
            for image in made
        ],
        "size": plan.size,
        "quality": plan.quality,
        "output_format": plan.format,
        "background": "opaque",
        "usage": usage(plan, made),
        "model": plan.student.name,
        "num_inference_steps": plan.nfe,
        "fingerprint": made[0].fingerprint,
        "timings": timings.document(),
    }


def usage(plan: Plan, made: list[Made], text: bool = True) -> dict[str, Any]:
    """Text tokens once per request; an image counts its latent positions."""
    _, height, width = plan.student.sizes[plan.size]
    tokens, pictures = made[0].tokens if text else 0, height * width * len(made)
    return {
        "input_tokens": tokens,
        "output_tokens": pictures,
        "total_tokens": tokens + pictures,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
    }
