"""Named training runs: frozen configuration objects. `fewstep train NAME` runs one; `--set field=value` changes it."""

from dataclasses import dataclass
from pathlib import Path

from tdm_train.backbone_recipes import BACKBONE_RECIPES
from tdm_train.tdm_recipe import TdmRecipe


@dataclass(frozen=True)
class AutoencoderRecipe:
    """The scenes autoencoder. Batch sizes are per process; whole images use a quarter of the crops' batch."""

    iterations: int = 6500
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    kl_weight: float = 2e-4
    object_weight: float = 4.0
    crop_share: float = 0.75
    seed: int = 1

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes.autoencoder import train_autoencoder

        train_autoencoder(self, out, resume)


@dataclass(frozen=True)
class EvaluatorRecipe:
    """The network that reads pictures of the scenes world. The batch size is per process."""

    iterations: int = 2200
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    seed: int = 2

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes.evaluator import train_evaluator

        train_evaluator(self, out, resume)


@dataclass(frozen=True)
class TextEncoderRecipe:
    """The scenes text encoder, taught what captions state. The batch size is per process."""

    iterations: int = 2500
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 150
    ema: float = 0.99
    seed: int = 6

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes.text_encoder import train_text_encoder

        train_text_encoder(self, out, resume)


@dataclass(frozen=True)
class TeacherRecipe:
    """The scenes teacher: flow matching with guidance dropout on a frozen text encoder. The batch size is per process."""

    vae: str = "runs/scenes_vae/vae"
    text_encoder: str = "runs/scenes_text_encoder/text_encoder"
    start: str = ""  # a teacher folder whose transformer to go on from, or nothing for untrained weights
    scenes: int = 240_000
    iterations: int = 7500
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    text_dropout: float = 0.1
    noise_shift: float = 2.0  # above 1: more training where it is decided what is drawn
    seed: int = 6

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes.teacher import train_teacher

        train_teacher(self, out, resume)


@dataclass(frozen=True)
class MotionEvaluatorRecipe:
    """The network that reads clips of the scenes world in motion. The batch size is per process."""

    iterations: int = 2600
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    seed: int = 12

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes_video.evaluator import train_evaluator

        train_evaluator(self, out, resume)


@dataclass(frozen=True)
class MotionAutoencoderRecipe:
    """The autoencoder of clips, from that of the images. The batch size is per process."""

    image_vae: str = "tdm_train/scenes/teacher/vae"
    iterations: int = 8000
    batch: int = 4
    lr: float = 2e-4
    warmup: int = 100
    ema: float = 0.998
    kl_weight: float = 2e-4
    object_weight: float = 4.0
    seed: int = 11

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes_video.autoencoder import train_autoencoder

        train_autoencoder(self, out, resume)


@dataclass(frozen=True)
class MotionTextEncoderRecipe:
    """The text encoder of clips, taught what captions state. The batch size is per process."""

    iterations: int = 700
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 150
    ema: float = 0.99
    seed: int = 16

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes_video.text_encoder import train_text_encoder

        train_text_encoder(self, out, resume)


@dataclass(frozen=True)
class MotionTeacherRecipe:
    """The teacher of clips: v-prediction with guidance dropout on a frozen text encoder. The batch size is per process."""

    vae: str = "runs/motion_vae/vae"
    text_encoder: str = "runs/motion_text_encoder/text_encoder"
    start: str = ""  # a teacher folder whose transformer to go on from, or nothing for untrained weights
    clips: int = 120_000
    iterations: int = 8000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    text_dropout: float = 0.1
    snr_shift: float = 1.5  # above 1: more training where it is decided what happens
    seed: int = 17

    def train(self, out: Path, resume: bool) -> None:
        from tdm_train.scenes_video.teacher import train_teacher

        train_teacher(self, out, resume)


RECIPES = {
    "scenes_evaluator": EvaluatorRecipe(),
    "scenes_vae": AutoencoderRecipe(),
    "scenes_text_encoder": TextEncoderRecipe(),
    "scenes_teacher": TeacherRecipe(),
    # To 1 NFE teacher and fake score are asked at all noise levels alike and with guidance everywhere: it decides all at once.
    "scenes_tdm": TdmRecipe(
        shift=2.0,
        shares=(3.0, 1.0, 1.0, 2.0),
        guidance_until=(1000.0, 850.0, 850.0, 850.0),
        interval="to_terminal",
        tau_shift=(1.0, 2.0, 2.0, 2.0),
        fake_loss="velocity",
        teacher_weight=0.0,
        iterations=1300,
    ),
    **BACKBONE_RECIPES,
    "motion_evaluator": MotionEvaluatorRecipe(),
    "motion_vae": MotionAutoencoderRecipe(),
    "motion_text_encoder": MotionTextEncoderRecipe(),
    "motion_teacher": MotionTeacherRecipe(),
    "motion_tdm": TdmRecipe(
        name="motion",
        teacher="tdm_train/scenes_video/teacher",
        base="fewstep clips teacher",
        family="cogvideox",
        text_length=16,
        frames=16,
        fps=8,
        guidance=1.75,
        seed=18,
    ),
}
