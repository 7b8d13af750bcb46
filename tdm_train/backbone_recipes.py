"""A recipe for every backbone of the paper, and one for any: all that they lack is a file of prompts, `--set prompts=FILE`.

Numbers without a remark are the paper's (arXiv 2503.06674). They are written for a global batch of batch * accumulation *
processes; where GPUs are smaller or fewer, change these three together.
"""

from dataclasses import replace

from tdm_train.tdm_recipe import TdmRecipe

SD3_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

ANY = TdmRecipe(
    name="tdm",
    teacher="",
    revision="main",
    base="",
    prompts="",
    text_length=77,
    guidance=3.5,
    batch=8,
    accumulation=4,
    gradient_checkpointing=True,
    weights="lora",
    student_lr=1e-4,
    fake_lr=5e-4,
    warmup=0,
    sample_every=100,
    samples=4,
)

PIXART = replace(
    ANY,
    name="tdm-pixart",
    teacher="PixArt-alpha/PixArt-XL-2-512x512",
    family="pixart",
    text_length=120,
    sizes=("512x512",),
    nfe=(4,),
    weights="full",
    iterations=500,
    rho="huber_vector",
    student_lr=2e-6,
    fake_lr=2e-5,
    ema=0.0,
)

BACKBONE_RECIPES = {
    "tdm": ANY,
    "tdm_pixart": PIXART,
    "tdm_pixart_1024": replace(PIXART, teacher="PixArt-alpha/PixArt-XL-2-1024-MS", sizes=("1024x1024",)),
    "tdm_pixart_demo": replace(  # the public demo's
        PIXART, guidance=4.5, last_timestep=899.0, student_lr=4e-6, betas=(0.0, 0.95), rho="huber_elementwise"
    ),
    "tdm_sd15": replace(
        PIXART,
        name="tdm-sd15",
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        family="stable_diffusion",
        text_length=77,
        nfe=(1, 2, 4),
        iterations=20_000,
        batch=16,
        accumulation=16,
    ),
    "tdm_sdxl": replace(
        PIXART,
        name="tdm-sdxl",
        teacher="stabilityai/stable-diffusion-xl-base-1.0",
        family="sdxl",
        text_length=77,
        sizes=("512x512", "1024x1024"),
        guidance=8.0,
        iterations=2000,
        batch=4,
        accumulation=16,
        student_lr=1e-6,
        fake_lr=5e-6,
    ),
    "tdm_sd3": replace(  # the authors' later code, for SD3.5 Medium
        ANY,
        name="tdm-sd3",
        teacher="stabilityai/stable-diffusion-3.5-medium",
        family="sd3",
        text_length=256,
        sizes=("1024x1024",),
        nfe=(4,),
        last_timestep=1000.0,
        shift=3.0,
        guidance=4.5,
        fake_loss="velocity",
        rank=32,
        alpha=64,
        targets=SD3_TARGETS,
        accumulation=8,
        student_lr=7.5e-5,
        fake_lr=3e-4,
        ema=0.9,
    ),
    "tdm_cogvideox_2b": replace(  # the released student's grid; the rest is BLADE's, of 5B
        ANY,
        name="tdm-cogvideox-2b",
        teacher="THUDM/CogVideoX-2b",
        family="cogvideox",
        text_length=226,
        sizes=("720x480",),
        frames=49,
        fps=8,
        nfe=(4,),
        grids=((999.0, 856.0, 665.0, 399.0),),
        betas=(0.0, 0.95),
        iterations=300,
        batch=1,
        accumulation=20,
    ),
    "tdm_cogvideox_5b": replace(  # BLADE's
        ANY,
        name="tdm-cogvideox-5b",
        teacher="THUDM/CogVideoX-5b",
        family="cogvideox",
        text_length=226,
        sizes=("720x480",),
        frames=49,
        fps=8,
        nfe=(8,),
        betas=(0.0, 0.95),
        iterations=300,
        batch=1,
        accumulation=20,
    ),
}
