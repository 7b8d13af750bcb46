"""An unmodified openai client against the real server."""

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from tests.conftest import Server


@pytest.fixture
def client(triton_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{triton_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_gets_a_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="scenes",
        prompt="a large yellow star on a purple background",
        n=2,
        quality="medium",
        output_format="webp",
        extra_body={"seed": 7},
    )
    assert answer.data is not None
    assert answer.usage is not None
    assert len(answer.data) == 2
    assert answer.output_format == "webp"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert f"{picture.width}x{picture.height}" == answer.size


def test_it_lists_the_models(client: openai.OpenAI) -> None:
    assert "scenes" in [model.id for model in client.models.list()]
    assert client.models.retrieve("scenes").owned_by == "fewstep"


def test_it_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="scenes", prompt="a", extra_body={"num_inference_steps": 9})
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="gpt-image-1", prompt="a")
    assert missing.value.code == "model_not_found"
