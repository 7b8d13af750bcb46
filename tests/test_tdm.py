"""TDM's identities: what must hold whatever the networks are."""

import copy
from typing import get_args

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from tdm_train.backbones.pixart import PixArtDenoiser
from tdm_train.denoiser import Text
from tdm_train.losses import student_loss, x0_minsnr_loss
from tdm_train.query import Interval, Query, draw_landing, draw_tau, query
from tdm_train.rollout import guided, guided_x0, rollout, rollout_to
from tdm_train.schedule import NoiseSchedule, grid
from tdm_train.steps_aware import fold, make_steps_aware, timestep_embedding, unfold
from tdm_train.targets import FakeTarget, fake_target

ABAR = torch.linspace(0.9999**0.5, 0.0047**0.5, 1000).square()
SCHEDULES = [NoiseSchedule("flow_prediction"), *(NoiseSchedule(kind, ABAR) for kind in ("epsilon", "v_prediction", "sample"))]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.prediction_type)
BATCH = 6


def tiny_denoiser(seed: int = 0) -> PixArtDenoiser:
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return PixArtDenoiser(transformer, SCHEDULES[0])


def text(batch: int = BATCH) -> Text:
    return Text(torch.randn(batch, 5, 8), torch.ones(batch, 5, dtype=torch.int64))


@schedules
def test_predictions_of_every_family_agree_with_the_state(schedule: NoiseSchedule) -> None:
    x0, eps, t = torch.randn(BATCH, 4, 4, 4), torch.randn(BATCH, 4, 4, 4), torch.rand(BATCH) * 900 + 20
    x_t = schedule.add_noise(x0, eps, t)
    x0_hat, eps_hat = schedule.x0_eps(x_t, schedule.network_target(x0, eps, t), t)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(eps_hat, eps, rtol=1e-3, atol=1e-4)


def asked_at(schedule: NoiseSchedule, x0: torch.Tensor, landing: float | torch.Tensor, tau: float | torch.Tensor) -> Query:
    landing, tau = (torch.zeros(len(x0)) + value for value in (landing, tau))
    return query(schedule, x0, torch.randn_like(x0), landing, tau, torch.randn_like(x0))


@schedules
def test_landing_on_0_is_clean_and_evaluating_at_0_is_not_where_noise_is_left(schedule: NoiseSchedule) -> None:
    x0, eps, zero = torch.randn(2, 4), torch.randn(2, 4), torch.zeros(2)
    assert torch.equal(schedule.add_noise(x0, eps, zero), x0)
    left = 0.0 if schedule.alphas_cumprod is None else float(1 - ABAR[0]) ** 0.5
    assert schedule.evaluated_a_s(zero)[1].tolist() == pytest.approx([left] * 2, rel=1e-4)


def test_v_prediction_is_exact_where_no_signal_is_left() -> None:
    schedule = NoiseSchedule("v_prediction", torch.cat([ABAR[:-1], torch.zeros(1)]))
    x0, eps, last = torch.randn(2, 4), torch.randn(2, 4), torch.full((2,), 999.0)
    assert torch.equal(schedule.add_noise(x0, eps, last), eps)
    x0_hat, eps_hat = schedule.x0_eps(eps, schedule.network_target(x0, eps, last), last)
    assert torch.equal(x0_hat, x0)
    assert torch.equal(eps_hat, eps)


def test_timesteps_are_counted_by_the_schedule_and_need_not_be_1000() -> None:
    half = torch.tensor([250.0])
    assert [float(value) for value in NoiseSchedule("flow_prediction", train_timesteps=500).a_s(half)] == [0.5, 0.5]
    assert float(NoiseSchedule("epsilon", ABAR[:500], 500).a_s(torch.tensor([499.9]))[0]) == float(ABAR[499].sqrt())
    assert NoiseSchedule("epsilon", ABAR.double()).a_s(half.double())[0].dtype == torch.float64


def test_an_illegal_schedule_is_refused_with_what_is_legal() -> None:
    with pytest.raises(
        ValueError, match="prediction_type='noise', legal: 'epsilon', 'v_prediction', 'sample', 'flow_prediction'"
    ):
        NoiseSchedule("noise", ABAR)
    with pytest.raises(ValueError, match="alphas_cumprod goes with every prediction_type but flow_prediction, not 'epsilon'"):
        NoiseSchedule("epsilon")
    with pytest.raises(ValueError, match="train_timesteps=1000, legal: 500"):
        NoiseSchedule("epsilon", ABAR[:500])


@schedules
@pytest.mark.parametrize("interval", ["separate", "to_terminal"])
def test_the_query_is_a_x0_plus_s_mix_exactly(schedule: NoiseSchedule, interval: Interval) -> None:
    landing, start = torch.tensor([0.0, 0, 249, 249, 499, 749]), torch.tensor([249.0, 999, 499, 749, 749, 999])
    tau = draw_tau(interval, landing, start, 999, torch.rand(BATCH))
    asked = asked_at(schedule, torch.randn(BATCH, 4, 4, 4), landing, tau)
    torch.testing.assert_close(schedule.add_noise(asked.x0, asked.mix, tau), asked.x_tau, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("random_landing", [False, True])
def test_separate_intervals_are_disjoint_across_a_trajectory(random_landing: bool) -> None:
    times, uniform = torch.tensor(grid(4)), torch.linspace(0, 1 - 1e-6, 1000)
    for i in range(1, 5):
        landing, start = times[i - 1].expand(1000), times[i].expand(1000)
        if random_landing:
            landing = draw_landing(landing, start, uniform.flip(0))
        tau = draw_tau("separate", landing, start, 999, uniform)
        assert bool((tau >= landing.clamp(min=20)).all())
        assert float(tau.min()) >= float(times[i - 1])
        assert float(tau.max()) < float(times[i]) - 9.99


def test_intervals_to_the_terminal_time_end_below_it_wherever_the_student_lands() -> None:
    uniform = torch.linspace(0, 1 - 1e-6, 1000)
    start = torch.full_like(uniform, 899.0)
    landing = draw_landing(torch.full_like(uniform, 674.0), start, uniform)
    assert float(landing.max()) == pytest.approx(879, abs=0.01)
    tau = draw_tau("to_terminal", landing, start, 899, uniform.flip(0))
    assert bool((tau > landing + 9.99).all())
    assert float(tau.max()) <= 889


@pytest.mark.parametrize("interval", ["separate", "to_terminal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_taus_crowd_at_the_upper_end_of_the_same_interval(interval: Interval, shift: float) -> None:
    uniform = torch.linspace(0, 1, 10_001)
    landing, start = torch.full_like(uniform, 249.75), torch.full_like(uniform, 499.5)
    place = torch.linspace(0, 1, 10_001)
    even, tau = (draw_tau(interval, landing, start, 999, uniform, shift) for shift in (1.0, shift))
    torch.testing.assert_close(tau[[0, -1]], even[[0, -1]])
    share_below = (tau[:, None] < even[None, ::100]).float().mean(0)
    expected = place[::100] / (shift - (shift - 1) * place[::100])  # where shift*u / (1 + (shift - 1)*u) is solved for u
    torch.testing.assert_close(share_below, expected, rtol=0, atol=1e-3)


@schedules
def test_the_renoised_state_has_the_schedules_variance(schedule: NoiseSchedule) -> None:
    asked = asked_at(schedule, torch.zeros(20_000, 1), 249.0, 600.0)
    _, s = schedule.a_s(asked.tau)
    assert float(asked.x_tau.std()) == pytest.approx(float(s[0]), rel=0.03)


def test_the_student_has_zero_gradient_when_teacher_equals_fake_score() -> None:
    x0 = torch.randn(BATCH, 4, 4, 4, requires_grad=True)
    asked = asked_at(SCHEDULES[0], x0, 249.0, 400.0)
    score = torch.randn_like(x0)
    student_loss(asked, score, score, "huber_elementwise").backward()
    assert float(x0.grad.abs().max()) == 0


def test_the_students_gradient_points_from_the_teacher_to_the_fake_score() -> None:
    x0 = torch.randn(BATCH, 4, 4, 4, requires_grad=True)
    asked = asked_at(SCHEDULES[0], x0, 249.0, 400.0)
    teacher_x0, fake_x0 = torch.randn_like(x0), torch.randn_like(x0)
    student_loss(asked, teacher_x0, fake_x0, "huber_elementwise").backward()
    assert torch.equal(x0.grad.sign(), (fake_x0 - teacher_x0).sign())


def three_networks() -> tuple[PixArtDenoiser, PixArtDenoiser, PixArtDenoiser]:
    teacher = tiny_denoiser()
    student, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
    make_steps_aware(student.network, (1, 2, 4))
    make_steps_aware(fake_score.network, (1, 2, 4))
    return student, teacher, fake_score


def has_gradient(module: torch.nn.Module) -> bool:
    return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


@pytest.mark.parametrize("fake_target_name", get_args(FakeTarget))
@pytest.mark.parametrize("update", ["student", "fake_score"])
def test_each_update_reaches_its_own_network_alone(update: str, fake_target_name: FakeTarget) -> None:
    student, teacher, fake_score = three_networks()
    words, nfe, tau = text(), torch.full((BATCH,), 2), torch.full((BATCH,), 700.0)
    x_t, start, landing = torch.randn(BATCH, 4, 4, 4), torch.full((BATCH,), 999.0), torch.full((BATCH,), 499.5)
    x0, eps = student(x_t, start, words, nfe)
    asked = query(student.schedule, x0, eps, landing, tau, torch.randn_like(x0))
    if update == "student":
        guided = guided_x0(teacher, asked.x_tau, tau, words, text(), 3.0)
        loss = student_loss(asked, guided, fake_score(asked.x_tau, tau, words, nfe)[0], "huber_elementwise")
    else:
        target = fake_target(fake_target_name, asked, student.schedule)
        fake = fake_score(asked.x_tau.detach(), tau, words, nfe)
        loss = x0_minsnr_loss(fake, target, tau, student.schedule, target.weight)
    loss.backward()
    reached = {
        name for name, net in [("student", student), ("teacher", teacher), ("fake_score", fake_score)] if has_gradient(net)
    }
    assert reached == {update}


def test_k_conditioning_starts_as_an_exact_no_op() -> None:
    plain = tiny_denoiser()
    aware = copy.deepcopy(plain)
    make_steps_aware(aware.network, (1, 2, 3, 4))
    x, t, words = torch.randn(BATCH, 4, 4, 4), torch.full((BATCH,), 500.0), text()
    assert torch.equal(plain(x, t, words)[0], aware(x, t, words, torch.full((BATCH,), 3))[0])


def test_a_folded_student_is_the_steps_aware_one_at_that_k_and_unfolds_again() -> None:
    aware = tiny_denoiser()
    make_steps_aware(aware.network, (1, 4))
    torch.nn.init.normal_(timestep_embedding(aware.network)[1].k_embedding)
    x, t, words = torch.randn(BATCH, 4, 4, 4), torch.full((BATCH,), 500.0), text()
    at = {nfe: aware(x, t, words, torch.full((BATCH,), nfe))[0] for nfe in (1, 4)}
    assert not torch.allclose(at[1], at[4])
    vectors = fold(aware.network, 4)
    torch.testing.assert_close(aware(x, t, words)[0], at[4])
    unfold(aware.network, vectors, 4)
    torch.testing.assert_close(aware(x, t, words, torch.ones(BATCH, dtype=torch.int64))[0], at[1])


def test_k_outside_the_legal_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 4\) are not all in 1 .. 64"):
        make_steps_aware(tiny_denoiser().network, (0, 4))


def test_a_trajectory_starts_at_the_noise_ends_at_x0_and_is_deterministic() -> None:
    student, _, _ = three_networks()
    noise, words = torch.randn(BATCH, 4, 4, 4), text()
    first, second = (rollout(student, student.schedule, noise, words, torch.tensor(grid(4))) for _ in range(2))
    assert torch.equal(first.states[4], noise)
    torch.testing.assert_close(first.states[0], first.predictions[1][0])
    assert torch.equal(first.states[0], second.states[0])


@pytest.mark.parametrize("i", [[1, 2, 3, 4, 1, 2], [4, 4, 4, 4, 4, 4], [2, 3, 2, 3, 2, 2]])
def test_a_sample_at_its_own_step_is_where_the_whole_trajectory_has_it_and_is_evaluated_no_further(i: list[int]) -> None:
    student, _, _ = three_networks()
    noise, words, times = torch.randn(BATCH, 4, 4, 4), text(), torch.tensor(grid(4))
    whole, evaluated = rollout(student, student.schedule, noise, words, times), []

    def counted(x_t: torch.Tensor, t: torch.Tensor, *others) -> tuple[torch.Tensor, torch.Tensor]:
        evaluated.append(len(t))
        return student(x_t, t, *others)

    x_t, x0, eps = rollout_to(counted, student.schedule, noise, words, times, torch.tensor(i))
    for row, own in enumerate(i):
        torch.testing.assert_close(x_t[row], whole.states[own][row])
        torch.testing.assert_close((x0[row], eps[row]), tuple(part[row] for part in whole.predictions[own]))
    assert evaluated == [max(1, sum(own <= step for own in i)) for step in (4, 3, 2, 1)]


def test_texts_without_what_is_padding_in_all_of_them_are_predicted_alike() -> None:
    denoiser, x_t, t = tiny_denoiser(), torch.randn(BATCH, 4, 4, 4), torch.rand(BATCH) * 999
    words, empty = text(), text()
    words.mask[:, 3:] = 0
    words.mask[0, 2:] = 0
    empty.mask[:, 1:] = 0
    short, short_empty = Text.unpadded(words, empty)
    assert short.emb.shape == short_empty.emb.shape == (BATCH, 3, 8)
    with torch.no_grad():
        for padded, spared in ((words, short), (empty, short_empty)):
            torch.testing.assert_close(denoiser(x_t, t, spared), denoiser(x_t, t, padded))
    unmasked = Text(words.emb)
    assert Text.unpadded(unmasked, unmasked)[0].emb is words.emb


def test_above_its_last_timestep_guidance_leaves_the_teacher_as_it_is() -> None:
    teacher, x_t, words, empty = tiny_denoiser(), torch.randn(BATCH, 4, 4, 4), text(), text()
    t = torch.tensor([100.0, 500.0, 800.0, 801.0, 900.0, 999.0])
    with torch.no_grad():
        limited = guided(teacher, empty, 3.0, guidance_until=800.0)(x_t, t, words, None)
        everywhere, alone = guided(teacher, empty, 3.0)(x_t, t, words, None), teacher(x_t, t, words)
    for ours, pushed, plain in zip(limited, everywhere, alone, strict=True):
        assert torch.equal(ours[:3], pushed[:3])
        torch.testing.assert_close(ours[3:], plain[3:])
        assert not torch.isclose(ours[3:], pushed[3:]).all()
