"""Makes a body consistent that is legal field by field: what fields mean together, JSON Schema would say only obscurely."""

import re

import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.generation.meta import CoverageScenario

IMAGES = "/v1/images/generations"
TIMEOUT, PATIENT = "X-Request-Timeout-Ms", "60000"


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case) -> schemathesis.Case:
    """Only cases that are to be accepted are touched; what must be refused is sent as it was drawn, with time enough."""
    if re.fullmatch("[1-9][0-9]{0,14}", str((case.headers or {}).get(TIMEOUT))) and not lacks_something(case):
        case.headers[TIMEOUT] = PATIENT  # a legal millisecond ends in an honest 504, which is no server error
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
        case.body = consistent(case.body, case.path == IMAGES)
        if case.path == IMAGES and accepts_bytes(case.body):
            case.headers["Accept"] = f"image/{case.body['output_format']}"
    if (case.query or {}).get("variant") == "thumbnail":
        case.query.pop("format", None)  # a thumbnail has one format
    return case


def lacks_something(case: schemathesis.Case) -> bool:
    """Whether a required header was left out, which a hook that touches the headers would undo."""
    return getattr(case.meta and case.meta.phase.data, "scenario", None) is CoverageScenario.MISSING_PARAMETER


def consistent(body: dict[str, object], images: bool) -> dict[str, object]:
    """What has no meaning beside another field is left out: an alias, and of images the quality of a png, and partial images
    without a stream.

    Whole numbers are written whole: JSON Schema calls 7.0 an integer, and we, as OpenAI, do not.
    """
    left_out = {"steps"} if "num_inference_steps" in body else set()
    if images and body.get("output_format") in (None, "png"):
        left_out.add("output_compression")
    if images and not body.get("stream"):
        left_out.add("partial_images")
    elif images:
        left_out.add("response_format")
    return {name: whole(value) for name, value in body.items() if name not in left_out}


def whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def accepts_bytes(body: dict[str, object]) -> bool:
    """Whether a case asks for the image itself, which OpenAPI leaves to the Accept header: half of those that may."""
    may = (
        body.get("output_format")
        and body.get("n") in (None, 1)
        and not body.get("stream")
        and body.get("response_format") != "url"
    )
    return bool(may) and len(str(body.get("prompt"))) % 2 == 0
