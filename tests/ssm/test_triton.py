"""The fused engine against the plain one in float64: in Triton's interpreter where there is no CUDA, else on the GPU.

`make test-gpu` runs the shapes of practical size (mark `gpu`); the interpreter runs small ones that reach the same branches.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from s4audio import S4, S4D
from s4audio.ssm import DISCRETIZATIONS, backend, chunk, diagonal, diagonal_system, ops, run
from tests.ssm.systems import ALPHA, FAMILIES, cast, discretize, error, parameters

fused = pytest.importorskip("s4audio.ssm.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [("diagonal", "lin"), ("dplr", "legs"), ("real modes", "real")]
# float32 comes out as float32. The others are rounded on the way in and out, and bfloat16 once more in every product.
VALUES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def through(
    implementation, kind: str, init: str, u: Tensor, d_state: int, exact: bool, state: bool = True
) -> dict[str, Tensor]:
    """Output and all gradients of a random system, and the final state if it has a first one; in float64 if exact, else in
    u's dtype."""
    torch.manual_seed(1)
    batch, H, length = u.shape
    dtype = torch.float64 if exact else torch.float32
    values = {
        name: cast(value, dtype).to(u.device).requires_grad_() for name, value in parameters(kind, init, H, d_state).items()
    }
    system = discretize(values, "bilinear", dtype)
    S = system.C.shape[1] * (2 if system.C.is_complex() else 1)
    drawn = [torch.randn(H, batch, S), torch.randn(batch, H, length), torch.randn(H, batch, S)]
    x, dy, dlast = (v.to(u.device) for v in drawn)
    u = (u.double() if exact else u).detach().requires_grad_()
    x = (x * state).to(dtype).requires_grad_()
    if state:
        y, last = implementation.run(system, u, x)
        torch.autograd.backward([y, last], [dy.to(y.dtype), dlast.to(last.dtype)])
        found = {"y": y, "last": last, "du": u.grad, "dx": x.grad}
    else:
        y = implementation.convolve(system, u) if implementation is fused else implementation.run(system, u, x)[0]
        y.backward(dy.to(y.dtype))
        found = {"y": y, "du": u.grad}
    found |= {f"d{name}": value.grad for name, value in values.items()}
    return {
        name: value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64)
        for name, value in found.items()
    }


def compare(
    kind: str,
    init: str,
    shape: tuple[int, int, int],
    d_state: int,
    dtype: torch.dtype,
    state: bool = True,
    looser: float = 1,
) -> None:
    """Values and gradients of the fused engine against float64; `looser` is for the gradients."""
    u = torch.randn(shape, device=DEVICE).to(dtype)
    wanted = through(chunk, kind, init, u, d_state, exact=True, state=state)
    found = through(fused, kind, init, u, d_state, exact=False, state=state)
    for name, value in found.items():
        tolerance = VALUES[dtype] if name in ("y", "last") else looser * GRADIENTS[dtype]
        assert error(value, wanted[name]) < tolerance, name


@pytest.mark.parametrize("length", [1, 3, 16, 31, 32, 33, 65, 200])
@pytest.mark.parametrize("kind, init", KINDS)
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_plain_engine_at_any_length(kind, init, length, state):
    compare(kind, init, (2, 3, length), 8, torch.float32, state)


@pytest.mark.parametrize("length", [1, 32, 70])
@pytest.mark.parametrize("kind, init", KINDS)
def test_one_channel(kind, init, length):
    compare(kind, init, (1, 1, length), 8, torch.float32)


@pytest.mark.parametrize("kind, init", FAMILIES)
def test_equals_the_plain_engine_in_every_family(kind, init):
    compare(kind, init, (2, 3, 100), 16, torch.float32, state=False)


@pytest.mark.parametrize("d_state", [2, 10, 64, 80, 256])
@pytest.mark.parametrize("state", [False, True])
def test_any_state_size(d_state, state):
    cancels = d_state == 2 and not state  # the gradient of its one mode: in float32 the plain engine is 4e-4 off
    compare("diagonal", "lin", (2, 2, 70), d_state, torch.float32, state, looser=40 if cancels else 1)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("kind, init", KINDS)
def test_any_batch(kind, init, batch):
    compare(kind, init, (batch, 2, 130), 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, init", KINDS)
def test_half_precision_in_half_precision_out(kind, init, dtype):
    compare(kind, init, (2, 3, 200), 8, dtype)


@pytest.mark.parametrize("kind, init", [("diagonal", "lin"), ("dplr", "legs")])
def test_products_of_two_parts_keep_sixteen_bits(monkeypatch, kind, init):
    monkeypatch.setattr(fused, "SMALL", 0)
    compare(kind, init, (2, 3, 200), 16, torch.float32, looser=20)  # dt sums over modes that cancel: 1.3e-4 on an H100


@pytest.mark.parametrize("layer", [S4D, S4])
def test_values_of_many_numbers_are_exact_also_where_errors_add_up(monkeypatch, layer):
    """A constant input, whose products round the same way every time: in two bfloat16 parts they would be 2e-5 off."""
    monkeypatch.setattr(fused, "SMALL", 0)
    module, u = layer(2, 64).to(DEVICE), torch.ones(2, 2, 1024, device=DEVICE)
    with torch.no_grad():
        with backend("chunk"):
            wanted = copy.deepcopy(module).double()(u.double())
        with backend("triton"):
            assert error(module(u).double().cpu(), wanted.cpu()) < 3e-6


@pytest.mark.parametrize("tiles", [2, 3])
def test_programs_that_walk_several_tiles(monkeypatch, tiles):
    monkeypatch.setattr(fused, "FILL", 1)
    monkeypatch.setattr(fused, "_programs", lambda lanes, channels: (-(-lanes // (16 * tiles)), tiles))
    compare("diagonal", "lin", (75, 2, 70), 8, torch.float32)
    compare("dplr", "legs", (40, 2, 70), 8, torch.float32)


@pytest.mark.parametrize("layer", [S4D, S4])
def test_the_state_of_a_long_lane_stays_float32(monkeypatch, layer):
    """In bfloat16, over 128 chunks of slow modes: the rounding of a carry in bfloat16 would come back in each of them."""
    monkeypatch.setattr(fused, "cut", lambda u, groups=1: fused.Cut(64, 128, 0, 128, 1))
    module = layer(1, 16, dt_min=1e-4, dt_max=1e-4).to(DEVICE)
    u = torch.ones(1, 1, 64 * 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        with backend("chunk"):
            _, wanted = run(module.system(), u.double())
        with backend("triton"):
            _, found = run(module.system(), u)
    assert error(found.cpu(), wanted.cpu()) < 6e-3


@pytest.mark.parametrize("span", [1, 3, 7])
@pytest.mark.parametrize("kind, init", [("diagonal", "lin"), ("dplr", "legs")])
@pytest.mark.parametrize("state", [False, True])
def test_any_cut_into_segments(monkeypatch, kind, init, span, state):
    cut = fused.cut

    def into(u: Tensor, groups: int = 1) -> fused.Cut:
        shape = cut(u, groups)
        return shape._replace(span=span, num_segments=-(-shape.num_chunks // span))

    monkeypatch.setattr(fused, "cut", into)
    compare(kind, init, (2, 2, 32 * 7 + 5), 8, torch.float32, state)


@pytest.mark.parametrize("chunks, last", [(34, 2), (48, 1), (65, 3), (140, 1)])
@pytest.mark.parametrize("batch, state", [(1, False), (1, True), (3, True)])
def test_groups_of_segments(monkeypatch, batch, state, chunks, last):
    """Segments of 1 to 3 chunks, in 64 groups or 16, some of which may be empty; the last segment is shorter, or not."""
    monkeypatch.setattr(fused, "cut", lambda u, groups=1: fused.Cut(16, chunks, 3, last, -(-chunks // last)))
    # dt is one number, of modes that cancel: six draws of 140 chunks are 0.3e-5 to 1.2e-5 off, all else below 0.1e-5.
    compare("diagonal", "lin", (batch, 1, 16 * chunks + 3), 8, torch.float32, state, looser=3)


@pytest.mark.parametrize(
    "shape", [(64, 512, 1024), (8, 64, 131072), (1, 64, 2**20), (1, 2, 90000), (128, 512, 16), (3, 1, 1)]
)
def test_the_cut_covers_the_sequence_and_wastes_no_steps(shape):
    for dtype, groups in itertools.product(fused.PRECISION, (1, 64)):
        found = fused.cut(torch.empty(shape, dtype=dtype, device="meta"), groups)
        assert found.num_chunks * found.T + found.rest == shape[2]
        assert (found.num_segments - 1) * found.span < max(1, found.num_chunks) <= found.num_segments * found.span
        assert found.num_chunks == 0 or 1 <= found.last_span <= found.span


def test_a_block_carries_on_where_the_last_one_ended():
    system = discretize(parameters("diagonal", "lin", 3, 8), "zoh", torch.float32)
    system = system._replace(**{name: getattr(system, name).to(DEVICE) for name in ("log_A_bar", "B_bar", "C")})
    u = torch.randn(2, 3, 150, device=DEVICE)
    with backend("triton"):
        whole, after = run(system, u)
        outputs, state = [], None
        for block in u.split([1, 70, 0, 79], dim=-1):
            y, state = run(system, block, state)
            outputs.append(y)
    assert error(torch.cat(outputs, -1).cpu(), whole.cpu()) < 1e-5
    assert error(state.cpu(), after.cpu()) < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_sequence(bad):
    u = torch.randn(3, 2, 100, device=DEVICE)
    u[1, 0, 40] = bad
    system = discretize({k: v.to(DEVICE) for k, v in parameters("diagonal", "lin", 2, 8).items()}, "zoh", torch.float32)
    with backend("triton"):
        y, _ = run(system, u)
    assert torch.isfinite(y[[0, 2]]).all() and torch.isfinite(y[1, 1]).all()
    assert not torch.isfinite(y[1, 0, 64:]).any()


@pytest.mark.gpu
def test_gpu_gradients_are_the_same_every_time():
    u = torch.randn(40, 64, 3000, device=DEVICE)
    first, second = (through(fused, "diagonal", "lin", u, 64, exact=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch_has_gradients_of_zero():
    layer = S4D(2, 8).to(DEVICE)
    with backend("triton"):
        layer(torch.zeros(0, 2, 50, device=DEVICE)).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_second_derivatives_are_refused_with_the_way_out():
    layer, u = S4D(2, 8).to(DEVICE), torch.randn(1, 2, 50, device=DEVICE, requires_grad=True)
    with backend("triton"):
        (first,) = torch.autograd.grad(layer(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; take them within s4audio.backend\('chunk'\)"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("name", ["triton", "chunk"])
def test_forward_mode_is_refused_and_not_wrong(name):
    layer, u = S4D(2, 8).to(DEVICE), torch.randn(1, 2, 50, device=DEVICE)
    with backend(name), pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(layer, (u,), (u,))


def test_two_devices_are_refused():
    system = discretize(parameters("diagonal", "lin", 3, 8), "zoh", torch.float32)
    with pytest.raises(ValueError, match="u is on meta and the system on cpu; move one of them"):
        run(system, torch.ones(1, 3, 4, device="meta"))


def test_inputs_may_be_strided_and_the_gradient_expanded():
    system = discretize({k: v.to(DEVICE) for k, v in parameters("diagonal", "lin", 3, 8).items()}, "zoh", torch.float32)
    plain = torch.randn(2, 100, 3, device=DEVICE)
    for u in (plain.mT, plain.mT.flip(1)[:, :, ::2]):
        u = u.detach().requires_grad_()
        gradients = []
        for name in ("triton", "chunk"):
            with backend(name):
                y, _ = run(system, u)
            gradients += torch.autograd.grad(y.mean(-1).sum(), u)
        assert error(gradients[0].cpu(), gradients[1].cpu()) < 1e-5


def test_no_states_are_kept_without_a_gradient(monkeypatch):
    kept = []
    real = fused.walk
    monkeypatch.setattr(fused, "walk", lambda *args: kept.append(args[-2:]) or real(*args))
    layer, u = S4D(2, 8).to(DEVICE), torch.randn(1, 2, 50, device=DEVICE)
    with backend("triton"):
        layer(u)
        with torch.no_grad():
            layer(u)
    assert kept == [(True, False), (False, False)]


def test_refusals_say_why():
    system = discretize(parameters("diagonal", "lin", 3, 8), "async", torch.float32, gap=torch.ones(4))
    with backend("triton"):
        with pytest.raises(RuntimeError, match="one gap per sample"):
            run(system, torch.ones(1, 3, 4))
        with pytest.raises(RuntimeError, match=r"u is torch.float64.*use auto or chunk"):
            run(discretize(parameters("diagonal", "lin", 3, 8), "zoh"), torch.ones(1, 3, 4, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="with 128 states, and its kernels take at most 64"):
            run(discretize(parameters("dplr", "legs", 1, 128), "bilinear", torch.float32), torch.ones(1, 1, 4))


@pytest.mark.parametrize(
    "module, name, value, reason",
    [
        (fused, "INTERPRETED", False, "u is on the cpu, and its kernels multiply bfloat16 and TF32 in CUDA"),
        (ops, "fused", None, "Triton is not installed"),
    ],
    ids=["no GPU", "no Triton"],
)
def test_where_it_cannot_run_it_is_refused_and_auto_goes_on(monkeypatch, module, name, value, reason):
    monkeypatch.setattr(module, name, value)
    system, u = discretize(parameters("diagonal", "lin", 3, 8), "zoh", torch.float32), torch.randn(1, 3, 4)
    with pytest.raises(RuntimeError, match=reason), backend("triton"):
        run(system, u)
    with backend("chunk"):
        wanted = run(system, u)[0]
    assert torch.equal(run(system, u)[0], wanted)


# Both ways, and the skip term


def both_ways(layer: torch.nn.Module, u: Tensor, name: str) -> dict[str, Tensor]:
    """Output and all gradients of a bidirectional layer."""
    u = u.detach().requires_grad_()
    with backend(name):
        y = layer(u)
    layer.zero_grad()
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.detach().cpu().double() for name, value in {"y": y, "du": u.grad, **gradients}.items()}


def compare_both_ways(layer: torch.nn.Module, shape: tuple[int, int, int], dtype: torch.dtype, looser: float = 1) -> None:
    """The fused layer against the plain one in float64."""
    u = torch.randn(shape).to(dtype)
    wanted = both_ways(copy.deepcopy(layer).double(), u.double(), "chunk")
    found = both_ways(layer.to(DEVICE), u.to(DEVICE), "triton")
    for name, value in found.items():
        tolerance = VALUES[dtype] if name == "y" else looser * GRADIENTS[dtype]
        assert error(value, wanted[name]) < tolerance, name


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 200])
@pytest.mark.parametrize("layer", [S4D, S4])
def test_both_ways_at_any_length(layer, length):
    compare_both_ways(layer(3, 8, bidirectional=True), (2, 3, length), torch.float32)


@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("layer", [S4D, S4])
def test_both_ways_in_segments(monkeypatch, layer, span):
    cut = fused.cut

    def into(u: Tensor, groups: int = 1) -> fused.Cut:
        shape = cut(u, groups)
        return shape._replace(span=span, num_segments=-(-shape.num_chunks // span))

    monkeypatch.setattr(fused, "cut", into)
    compare_both_ways(layer(2, 8, bidirectional=True), (2, 2, 32 * 7 + 5), torch.float32)


def test_both_ways_of_many_modes_and_in_half_precision():
    compare_both_ways(S4D(2, 80, bidirectional=True), (2, 2, 70), torch.float32, looser=2)
    compare_both_ways(S4D(2, 8, bidirectional=True), (2, 2, 200), torch.bfloat16, looser=2)


@pytest.mark.parametrize("layer", [S4D, S4])
def test_the_skip_term_has_its_gradient(layer):
    compare_both_ways(layer(3, 8), (2, 3, 70), torch.float32)


# Discretization


def discretized(make, values: dict[str, Tensor], discretization: str, **options) -> dict[str, Tensor]:
    """log A_bar, B_bar and all gradients of a weighted sum of them."""
    values = {name: value.detach().requires_grad_() for name, value in values.items()}
    system = make(**values, discretization=discretization, **options)
    torch.manual_seed(2)
    outputs = [torch.view_as_real(v) for v in (system.log_A_bar, system.B_bar)]
    loss = sum((v * torch.randn(v.shape).to(v.device)).sum() for v in outputs)
    names = ("A", "B", "dt")
    gradients = torch.autograd.grad(loss, [values[name] for name in names])
    found = {"log_A_bar": system.log_A_bar, "B_bar": system.B_bar, **dict(zip(names, gradients, strict=True))}
    return {name: cast(value.detach().cpu(), torch.float64) for name, value in found.items()}


@pytest.mark.parametrize("size", [1.0, 30.0, 1e-3, 0.0])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_discretization_in_one_kernel_equals_the_formulas(discretization, size):
    """`size` scales A: poles far away, where the bilinear transform turns its angle over, near zero, and at zero."""
    values = parameters("diagonal", "lin", 3, 12)
    values["A"] = cast(cast(size * values["A"], torch.float32), torch.float64)
    options = {"alpha": ALPHA, "rate": 0.7} if discretization == "generalized_bilinear" else {}
    wanted = discretized(diagonal.diagonal_system, values, discretization, **options)
    single = {name: cast(value, torch.float32).to(DEVICE) for name, value in values.items()}
    with backend("triton"):
        found = discretized(diagonal_system, single, discretization, **options)
    for name, value in found.items():
        assert error(value, wanted[name]) < (1e-12 if name == "log_A_bar" else 2e-7), name


def test_the_layer_discretizes_in_one_kernel(monkeypatch):
    calls = []
    real = fused.discretize
    monkeypatch.setattr(fused, "discretize", lambda *args: calls.append(args) or real(*args))
    with backend("triton"):
        S4D(2, 4).to(DEVICE)(torch.randn(1, 2, 20, device=DEVICE))
    assert len(calls) == 1
    with backend("chunk"):
        S4D(2, 4).to(DEVICE)(torch.randn(1, 2, 20, device=DEVICE))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["triton", "chunk"])
def test_a_skip_term_of_another_size_is_refused_and_a_conjugate_is_taken(name):
    values = {key: cast(value, torch.float32).to(DEVICE) for key, value in parameters("diagonal", "lin", 2, 8).items()}
    u = torch.randn(1, 2, 20, device=DEVICE)
    with backend(name):
        system = diagonal_system(**values)
        for shape in ((), (1,), (4,), (2, 1)):
            with pytest.raises(ValueError, match=r"D has shape .*; wanted \(2,\)"):
                run(system, u, D=torch.ones(shape, device=DEVICE))
        wanted = run(system._replace(C=system.C.conj().resolve_conj()), u)[0]
        assert torch.equal(run(system._replace(C=system.C.conj()), u)[0], wanted)


def test_gaps_have_no_backward_direction():
    system = discretize(parameters("diagonal", "lin", 4, 8), "async", torch.float32, gap=torch.ones(5))
    with pytest.raises(ValueError, match="no backward direction"):
        ops.convolve(system, torch.ones(1, 2, 5), bidirectional=True)


def test_discretization_keeps_a_gap_and_leaves_other_precisions_to_pytorch(monkeypatch):
    values = parameters("diagonal", "lin", 2, 4)
    single = {name: cast(value, torch.float32).to(DEVICE) for name, value in values.items()}
    with backend("triton"):
        found = diagonal_system(**single, discretization="async", gap=2.5).log_A_bar
        assert error(found, diagonal_system(**values, discretization="async", gap=2.5).log_A_bar) < 1e-12
        monkeypatch.setattr(fused, "diagonal_system", None)
        diagonal_system(**values)
        diagonal_system(**{name: value.real for name, value in single.items()})


# torch.compile and torch.library


@pytest.mark.parametrize("name", ["triton", "chunk"])
@pytest.mark.parametrize("layer", [S4D, S4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compiles_whole_with_the_same_gradients(layer, bidirectional, name):
    torch.compiler.reset()
    module = layer(2, 8, bidirectional=bidirectional).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    u = torch.randn(2, 2, 100, device=DEVICE, requires_grad=True)
    with backend(name):
        results = []
        for function in (module, compiled):
            y = function(u)
            results.append((y, *torch.autograd.grad(y.square().sum(), [u, *module.parameters()])))
    for plain, whole in zip(*results, strict=True):
        assert error(whole.detach().cpu(), plain.detach().cpu()) < 1e-6


@pytest.mark.parametrize("name", ["triton", "chunk"])
def test_compiles_for_several_lengths(name):
    """With dynamic=False, one compilation for each: a length of unknown size has no chunks to cut it into."""
    torch.compiler.reset()  # it compiles one function so many times only, in all tests together
    layer = S4D(2, 8).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    with backend(name):
        for length in (100, 101, 130):
            u = torch.randn(1, 2, length, device=DEVICE)
            assert error(compiled(u).detach().cpu(), layer(u).detach().cpu()) < 1e-6


@pytest.mark.parametrize("H", [1, 2])
def test_operations_are_registered_as_torch_wants_them(H):
    torch.manual_seed(0)
    modes, T = 4, 32
    log = torch.stack([-torch.rand(H, modes), torch.randn(H, modes)], -1).double()
    B, C = torch.randn(H, modes, 2), torch.randn(H, modes, 2)
    log, B, C = (v.to(DEVICE).requires_grad_() for v in (log, B, C))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    A, dt = log.detach().float().requires_grad_(), torch.rand(H, device=DEVICE, requires_grad=True)
    torch.library.opcheck(fused.discretize, (A, B, dt, "zoh", 1.0, 0.5), test_utils=tests)
    D = torch.randn(H, device=DEVICE, requires_grad=True)
    torch.library.opcheck(fused.diagonal_operators, (log, B, C, D, T, 5), test_utils=tests)
    operators = [v.detach().requires_grad_() for v in fused.diagonal_operators(log, B, C, None, T, 5)]
    u, x = torch.randn(2, H, 69, device=DEVICE, requires_grad=True), torch.randn(H, 2, 2 * modes, device=DEVICE)
    dense = torch.randn(H, 2 * modes, 2 * modes) / 4, torch.randn(H, 2 * modes), torch.randn(H, 2, 2 * modes)
    dense = [v.double().to(DEVICE).requires_grad_() for v in dense]
    torch.library.opcheck(fused.dense_operators, (*dense, 16), test_utils=tests)
    for before in (x, x.clone().requires_grad_(), None):
        for final in (False, True):
            torch.library.opcheck(fused.walk, (u, before, *operators, True, final), test_utils=tests)


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 1000, 1024, 1047, 4096])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("kind, init", KINDS)
def test_gpu_any_batch_and_length(kind, init, batch, length):
    compare(kind, init, (batch, 3, length), 64, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("d_state", [2, 10, 64, 256])
@pytest.mark.parametrize("state", [False, True])
def test_gpu_state_sizes_on_a_long_sequence(d_state, state):
    compare("diagonal", "lin", (1, 2, 90000), d_state, torch.float32, state=state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, init", KINDS)
def test_gpu_half_precision(kind, init, dtype):
    compare(kind, init, (8, 16, 4096), 64, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_large(dtype):
    compare("diagonal", "lin", (16, 64, 8192), 64, dtype, looser=3)  # products of two parts, above SMALL


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [S4D, S4])
@pytest.mark.parametrize("length", [16, 1024, 5000])
def test_gpu_both_ways(layer, length):
    compare_both_ways(layer(16, 64, bidirectional=True), (8, 16, length), torch.float32, looser=3)
    compare_both_ways(layer(16, 64, bidirectional=True), (8, 16, length), torch.bfloat16, looser=2)


@pytest.mark.gpu
def test_gpu_bfloat16_with_float32_parameters():
    layer, u = S4D(4).cuda(), torch.randn(2, 4, 1000, device="cuda")
    y = layer(u.bfloat16())
    assert y.dtype == torch.bfloat16
    assert error(y.float().detach().cpu(), layer(u).detach().cpu()) < 1e-2
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(layer(u.bfloat16()), y)
