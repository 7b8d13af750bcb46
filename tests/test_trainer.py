"""The bundled teacher becomes a student folder that every door opens."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tdm_train.checkpoint import load_student, open_pipeline
from tdm_train.prompts import encode_prompts
from tdm_train.recipes import TdmRecipe
from tdm_train.rollout import rollout
from tdm_train.steps_aware import fold, timestep_embedding
from tdm_train.trainer import train_tdm

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tdm_train" / "scenes" / "teacher"
PROMPTS = ["a red circle above a blue square", "a large star, black background"]
pytestmark = pytest.mark.slow


def distil(out: Path, iterations: int) -> Path:
    train_tdm(TdmRecipe(teacher=str(TEACHER), iterations=iterations, batch=4, prompts=20, warmup=1), out, resume=False)
    return out / "student"


def test_a_student_of_no_iterations_is_its_teacher(tmp_path: Path) -> None:
    student, teacher = load_student(distil(tmp_path, 0)), open_pipeline(TEACHER)
    assert not fold(student.denoiser.network, 4).any()
    theirs = teacher.transformer.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.pipeline.transformer.state_dict().items())


def test_training_moves_the_student_and_diffusers_alone_samples_it_to_the_same_latents(tmp_path: Path) -> None:
    folder = distil(tmp_path, 3)
    student = load_student(folder)
    assert timestep_embedding(student.denoiser.network)[1].k_embedding.any()
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = encode_prompts(student.pipeline, PROMPTS, 32)
        ours = rollout(student.denoiser, student.denoiser.schedule, noise, text, student.grid(4)).states[0]
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        options = {"guidance_scale": 1, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 32}
        theirs = pipeline(PROMPTS, num_inference_steps=4, latents=noise, output_type="latent", **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
