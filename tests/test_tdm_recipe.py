"""A recipe that can be made is legal, and says which grid and which K every iteration has."""

from dataclasses import replace
from typing import Any

import pytest

from tdm_train.draws import draw_nfe
from tdm_train.tdm_recipe import TdmRecipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interval": "both"}, "interval='both', legal: one of separate, to_terminal"),
        ({"fake_loss": "mse"}, "fake_loss='mse', legal: one of x0_minsnr, velocity"),
        ({"fake_target": "dsm"}, "fake_target='dsm', legal: one of x0_student, subinterval_dsm"),
        ({"rho": "huber"}, "rho='huber', legal: one of huber_elementwise, huber_vector, mse"),
        ({"importance_clip": 0.5}, "importance_clip=0.5, legal: 1"),
        ({"importance_clip": float("nan")}, "importance_clip=nan, legal: 1"),
        ({"teacher_weight": 0.1}, "teacher_weight=0.1, legal: to be set with fake_loss=velocity alone, not with x0_minsnr"),
        ({"fake_loss": "velocity", "teacher_weight": -1.0}, "teacher_weight=-1.0, legal: 0 or more"),
        ({"teacher_warmup": 2001}, r"teacher_warmup=2001, legal: 0 to 2000 \(iterations\)"),
        ({"iterations": -1}, "iterations=-1, legal: 0 or more"),
        ({"ladder": (16, 8)}, "ladder_iterations=0, legal: 1 or more"),
        ({"ladder": (16, 8), "ladder_iterations": 1000}, "ladder_iterations=1000, legal: 1 or more, and fewer than 2000"),
        ({"ladder_iterations": 10}, "ladder_iterations=10, legal: 0 without a ladder"),
        ({"nfe": ()}, "legal: one NFE count or more"),
        ({"nfe": (0, 4)}, r"nfe=\(0, 4\), legal: different whole numbers from 1 on"),
        ({"nfe": (4, 4)}, "legal: different whole numbers from 1 on"),
        ({"shares": (2.0, 1.0)}, r"shares=\(2.0, 1.0\), legal: one number above 0 for each K of nfe=\(1, 2, 3, 4\), or none"),
        ({"shares": (1.0, 1.0, 1.0, 0.0)}, "legal: one number above 0 for each K"),
        ({"fake_updates": 0}, "fake_updates=0, legal: 1 or more"),
        ({"last_timestep": 1001}, "last_timestep=1001, legal: above 0 and up to 1000"),
        ({"tau_shift": (0.0,)}, r"tau_shift=\(0.0,\), legal: one number for each K of nfe=\(1, 2, 3, 4\), or one in all"),
        (
            {"tau_shift": (1.0, 2.0)},
            r"tau_shift=\(1.0, 2.0\), legal: one number for each K of nfe=\(1, 2, 3, 4\), or one in all",
        ),
        ({"tau_shift": ()}, r"tau_shift=\(\), legal: one number for each K of nfe=\(1, 2, 3, 4\), or one in all"),
        ({"start": "a", "weights": "lora"}, "start='a', legal: nothing with weights=lora, whose student is an adapter"),
        ({"start": "a", "ladder": (8,), "ladder_iterations": 1}, "start='a', legal: nothing with a ladder"),
        ({"tau_shift": ("high",)}, r"tau_shift=\('high',\), legal: one number for each K"),
        ({"guidance_until": (0.0,)}, r"guidance_until=\(0.0,\), legal: .*, above 0 and up to 1000"),
        ({"guidance_until": (1001.0,)}, r"such as \(2.0,\), above 0 and up to 1000, where guidance holds at every timestep"),
        ({"grids": (999, 499)}, r"legal: a tuple of grids, such as \(\(999, 856, 665, 399\),\)"),
        ({"grids": ((999, 800, 600, 400, 200),)}, "at most one for each K of nfe="),
        ({"grids": ((999, 499), (999, 299))}, "at most one for each K of nfe="),
        ({"grids": ((499, 999),)}, "values that fall strictly, from at most 1000 to above 0"),
        ({"nfe": (40,)}, "the grid of 40 NFE, 999, .* leaves no room for tau: legal are longer steps for interval=separate"),
        ({"nfe": (33,), "random_landing": True, "last_timestep": 600.0}, "interval=separate with random_landing=True"),
        ({"interval": "to_terminal", "grids": ((999, 980),)}, "the grid of 2 NFE, 999, 980, leaves no room for tau"),
    ],
)
def test_what_is_not_legal_is_refused_by_name_and_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TdmRecipe(**changes)


def test_the_grid_is_the_papers_unless_the_recipe_states_one() -> None:
    recipe = TdmRecipe(grids=((999, 856, 665, 399),))
    assert recipe.grid(4) == [0, 399, 665, 856, 999]
    assert recipe.grid(3) == [0, 333, 666, 999]
    assert TdmRecipe().grid(4) == [0, 249.75, 499.5, 749.25, 999]


def test_the_public_demos_grid_is_that_of_899_in_whole_timesteps() -> None:
    assert [int(t) for t in TdmRecipe(last_timestep=899).grid(4)] == [0, 224, 449, 674, 899]


def test_a_ladder_comes_down_rung_by_rung_to_the_k_set() -> None:
    recipe = TdmRecipe(nfe=(1, 4), ladder=(16, 8), ladder_iterations=10, iterations=100)
    assert [recipe.nfe_at(step) for step in (0, 9, 10, 19, 20, 99)] == [(16,), (16,), (8,), (8,), (1, 4), (1, 4)]
    assert TdmRecipe().nfe_at(0) == (1, 2, 3, 4)


def test_a_number_for_each_k_is_that_ks_and_the_last_a_rungs() -> None:
    recipe = TdmRecipe(nfe=(4, 1), tau_shift=(2.0, 1.0), guidance_until=(850.0,), ladder=(8,), ladder_iterations=5)
    assert [recipe.of_nfe(recipe.tau_shift, nfe) for nfe in (1, 4, 8)] == [1.0, 2.0, 1.0]
    assert [recipe.of_nfe(recipe.guidance_until, nfe) for nfe in (1, 4, 8)] == [850.0] * 3


def test_a_k_with_twice_the_share_is_drawn_twice_as_often_and_a_rung_of_a_ladder_always() -> None:
    recipe = TdmRecipe(shares=(2, 1, 1, 1), ladder=(8,), ladder_iterations=5)
    drawn = [draw_nfe(recipe.seed, step, recipe.nfe_at(step), recipe.shares_at(step)) for step in range(2000)]
    assert set(drawn[:5]) == {8}
    counts = [drawn[5:].count(nfe) / len(drawn[5:]) for nfe in recipe.nfe]
    assert counts == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.05)


def test_the_objective_tells_every_field_but_where_the_teacher_lay() -> None:
    recipe = replace(TdmRecipe(), teacher="/home/someone/teacher", rho="mse")
    assert recipe.objective()["rho"] == "mse"
    assert "/home/someone" not in str(recipe.objective())
    assert {"interval", "fake_target", "grids", "seed"} <= set(recipe.objective())
