"""What holds of a whole call: all that is selected runs in FP4, or the call says what does not."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from support.closer import relative_l2
from support.nets import Net, net, rounded
from torch import nn

import fp4graph
from fp4graph import RecompileError, RefusalError, SelectorError, StudyError
from fp4graph.dynamo import GRAPHS_A_FUNCTION

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))


def disable(model: Net) -> None:
    model.layers[0].forward = torch._dynamo.disable(model.layers[0].forward)


def offload(model: Net) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def use_inner(model: Net) -> None:
    up = model.layers[0].mlp.up_proj
    up.forward = lambda x: torch.inner(x, up.weight) + up.bias


def never_call(model: Net) -> None:
    model.layers[0].k_proj = nn.Linear(32, 32)


HIDES: dict[str, tuple[Callable[[Net], None], str]] = {
    "disabled": (disable, "layers.0 is kept from compilation by torch._dynamo.disable"),
    "offloaded": (offload, "its weight is on the meta device between calls"),
    "inner": (use_inner, "its weight is read by inner, which is not rewritten"),
    "not called": (never_call, "this call did not reach it"),
}


@pytest.mark.parametrize("how", HIDES)
def test_what_no_graph_rewrites_is_an_error_or_a_row(how: str) -> None:
    hide, reason = HIDES[how]
    model = net()
    hide(model)
    backend = fp4graph.backend("blocks=0", inner="eager", model=model)
    call = torch.compile(model, backend=backend)
    for _ in range(2):  # and it does not pass the second time
        with pytest.raises(RefusalError, match=reason):
            call(X)
    torch._dynamo.reset()
    kept = fp4graph.backend("blocks=0", inner="eager", model=model, on_refusal="keep")
    torch.compile(model, backend=kept)(X)
    assert any(reason in row.reason for row in kept.report if not row.selected)


def test_what_is_in_no_graph_and_not_selected_is_a_row_too() -> None:
    model = net()
    disable(model)
    model.layers[1].mystery = nn.Linear(32, 32)  # `all` does not pick it: no rule knows its role
    backend = fp4graph.backend("blocks=1..2", inner="eager", model=model)
    torch.compile(model, backend=backend)(X)
    reasons = {row.path: row.reason for row in backend.report if not row.selected}
    assert set(reasons) == {
        "layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "layers.0.mlp.up_proj",
        "layers.0.mlp.down_proj", "layers.1.mystery",
    }  # fmt: skip
    assert all(reason.startswith("not in any graph: ") for reason in reasons.values())
    assert "torch._dynamo.disable" in reasons["layers.0.mlp.up_proj"]


def test_an_encoder_of_fused_ops_is_never_silently_dense() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    x = torch.randn(2, 5, 32)
    for options in ({}, {"model": model}):
        with pytest.raises(RefusalError, match="_transformer_encoder_layer_fwd"):
            torch.compile(model, backend=fp4graph.backend(inner="eager", **options))(x)
        torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
def test_no_linear_anywhere_is_an_error_but_not_for_none(options: dict[str, bool]) -> None:
    model = nn.LayerNorm(32)
    with pytest.raises(RefusalError, match="1 graphs hold no linear"), torch.no_grad():
        torch.compile(model, backend=fp4graph.backend(inner="eager"), **options)(X)
    torch._dynamo.reset()
    torch.compile(model, backend=fp4graph.backend("none", inner="eager"))(X)


def test_layers_compiled_alone_answer_for_themselves() -> None:
    model = net()
    backend = fp4graph.backend("all", inner="eager", model=model)
    expected = rounded(model)(X)
    for layer in model.layers:
        layer.compile(backend=backend)
    assert relative_l2(model(X), expected) < 1e-6
    assert len(backend.report.selected) == 12


def test_one_function_for_all_layers_decides_for_each() -> None:
    model = net()
    backend = fp4graph.backend("blocks=1", inner="eager", model=model)
    run = torch.compile(lambda layer, x: layer(x), backend=backend)
    x = X
    for layer in model.layers:
        x = run(layer, x)
    assert relative_l2(x, rounded(model, "layers.1.")(X)) < 1e-6
    assert {row.block for row in backend.report.selected} == {1}


def test_a_layer_with_a_patched_forward_keeps_its_path() -> None:
    model = net()
    expected = rounded(model, "layers.2.")(X)
    for layer in model.layers:
        layer._old_forward = layer.forward
        layer.forward = lambda x, layer=layer: layer._old_forward(x)
    backend = fp4graph.backend("blocks=2", inner="eager", model=model)
    assert relative_l2(torch.compile(model, backend=backend)(X), expected) < 1e-6


def test_layers_that_go_take_their_rows_and_the_last_block_moves() -> None:
    model = net(4)
    backend = fp4graph.backend("blocks=-1", inner="eager", model=model)
    call = torch.compile(model, backend=backend)
    call(X)
    model.layers = model.layers[1:]
    assert relative_l2(call(X), rounded(model, "layers.2.")(X)) < 1e-6
    assert {row.block for row in backend.report} == {0, 1, 2}
    assert {row.block for row in backend.report.selected} == {2}


def test_rows_of_computed_weights_stay_when_another_graph_comes() -> None:
    model = net(2)
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].mlp.up_proj)
    backend = fp4graph.backend("blocks=1", inner="eager", model=model)
    call = torch.compile(model, backend=backend, dynamic=False)
    for rows in (2, 3):
        call(torch.randn(rows, 32))
    row = backend.report.rows_by_path["layers.0.mlp.up_proj"]
    assert (row.role, row.selected) == ("up", False)


def test_two_models_in_two_threads_get_their_own_weights() -> None:
    models = [net(seed=seed) for seed in (1, 2)]
    run = torch.compile(lambda m, x: m(x), backend=fp4graph.backend("all", inner="eager"))
    wrong = []

    def work(model: Net) -> None:
        expected = rounded(model)(X)
        wrong.extend(1 for _ in range(40) if relative_l2(run(model, X), expected) > 1e-6)

    for model in models:
        run(model, X)
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_backend_made_in_one_thread_serves_another_with_many_shapes() -> None:
    model = net(1)
    call = torch.compile(model, backend=fp4graph.backend("all", inner="eager"), dynamic=False)
    errors = []

    def work() -> None:
        for rows in range(1, 16):
            x = torch.randn(rows, 32)
            errors.append(relative_l2(call(x), rounded(model)(x)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 15
    assert max(errors) < 1e-6


def test_too_many_graphs_are_an_error_that_says_so() -> None:
    model = net(1)
    call = torch.compile(model, backend=fp4graph.backend("all", inner="eager"), dynamic=False)
    for rows in range(1, GRAPHS_A_FUNCTION + 1):
        call(torch.randn(rows, 32))
    with pytest.raises(RecompileError, match="dynamic=True"):
        call(torch.randn(GRAPHS_A_FUNCTION + 1, 32))
    torch._dynamo.reset()
    call(torch.randn(GRAPHS_A_FUNCTION + 1, 32))


def test_other_compiled_functions_fall_back_as_ever() -> None:
    model = net(1)
    call = torch.compile(model, backend=fp4graph.backend("all", inner="eager"))
    call(X)
    other = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    for size in range(1, 60):
        assert torch.equal(other(torch.zeros(size)), torch.ones(size))


def test_an_error_inside_the_call_is_not_covered_up() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            raise KeyError("mine")

    model = net(cls=Fails)
    call = torch.compile(model, backend=fp4graph.backend("blocks=1", inner="eager", model=model))
    with pytest.raises(KeyError, match="mine"):
        call(X)


def test_a_call_from_an_except_clause_is_checked_too() -> None:
    model = net()
    disable(model)
    call = torch.compile(model, backend=fp4graph.backend("blocks=0", inner="eager", model=model))
    try:
        raise KeyError
    except KeyError:
        with pytest.raises(RefusalError, match="disable"):
            call(X)


def test_a_backend_by_name_is_one_backend_for_all_graphs() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model = net(cls=Breaks)
    options = {"select": "all", "inner": "eager", "model": model}
    call = torch.compile(model, backend="fp4graph", options=options)
    assert relative_l2(call(X), rounded(model)(X)) < 1e-6


def test_paths_mean_the_same_with_and_without_the_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(48, 32))
            self.w2 = nn.Parameter(torch.randn(32, 48))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.w1), self.w2.detach())

    model = nn.Sequential(Two(), nn.Linear(32, 32), Two()).requires_grad_(False)
    paths = []
    for known in (None, model):
        backend = fp4graph.backend("path:*w1 | path:1", inner="eager", model=known)
        torch.compile(model, backend=backend)(X)
        paths.append({row.path: row.selected for row in backend.report})
        torch._dynamo.reset()
    assert paths[0] == paths[1]
    assert paths[0] == {"0.w1": True, "0.w2": False, "1": True, "2.w1": True, "2.w2": False}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_an_unknown_mode_is_one_clear_error(inner: str) -> None:
    backend = fp4graph.backend("all", inner=inner)
    with pytest.raises(fp4graph.OptionError, match="mode='turbo': expected default"):
        torch.compile(net(1), backend=backend, mode="turbo")(X)


def test_freezing_is_refused_by_its_name() -> None:
    call = torch.compile(net(1), backend=fp4graph.backend("all", inner="eager"))
    with (
        torch._inductor.config.patch(freezing=True),
        torch.no_grad(),
        pytest.raises(RefusalError, match=r"config\.freezing"),
    ):
        call(X)


def test_gradients_that_forward_enables_are_refused() -> None:
    class Enables(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    model = net(1, cls=Enables).requires_grad_(True)
    call = torch.compile(model, backend=fp4graph.backend("all", inner="eager"))
    with torch.no_grad(), pytest.raises(fp4graph.GradientError, match="enable none within it"):
        call(X)


def test_weights_that_are_tensor_subclasses_are_refused_by_name() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = net(1)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(RefusalError, match=r"its weight is a \w*Tensor, not a plain tensor"):
        torch.compile(model, backend=fp4graph.backend("all", inner="eager"))(X)
    torch._dynamo.reset()
    kept = fp4graph.backend("all", inner="eager", on_refusal="keep")
    assert torch.equal(torch.compile(model, backend=kept)(X), model(X))


def test_a_traced_model_takes_a_selection_before_its_first_call() -> None:
    model = net()
    for select, error in (("blocks=99", SelectorError), ("blocks=0", None)):
        traced = fp4graph.TracedModel(copy.deepcopy(model))
        traced.select(fp4graph.Policy.of(select, fp4graph.Scheme.of()))
        if error:
            with pytest.raises(error, match="matches nothing"):
                traced(X)
        else:
            assert relative_l2(traced(X), rounded(model, "layers.0.")(X)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
@pytest.mark.parametrize("activations", [None, "same"])
def test_no_rows_at_all(shape: tuple[int, ...], activations: str | None) -> None:
    backend = fp4graph.backend("all", inner="eager", activations=activations)
    assert torch.compile(net(1), backend=backend)(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_that_runs_the_plain_model_is_an_error(stance: str) -> None:
    model = net()
    call = torch.compile(model, backend=fp4graph.backend("all", inner="eager"), dynamic=False)
    with torch.no_grad():
        expected = call(X)
        with torch.compiler.set_stance(stance):
            if stance == "eager_on_recompile":
                assert torch.equal(call(X), expected), "this shape has its graph"
            with pytest.raises(StudyError, match=f"set_stance.*{stance}.*dense"):
                call(torch.cat((X, X, X)))
        assert torch.equal(call(X), expected)
