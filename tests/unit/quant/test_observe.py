import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinysam.quant import observe as observe_module
from tinysam.quant.graph import INPUT, Layer
from tinysam.quant.observe import MinMaxObserver, PercentileObserver, Range, observe

arrays = st.lists(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=4
)


@given(arrays)
def test_min_max_covers_every_value_and_zero(parts: list[np.ndarray]) -> None:
    observer = MinMaxObserver()
    for part in parts:
        observer.see(part)
    values = np.concatenate(parts)
    assert observer.range() == Range(low=min(values.min(), 0.0), high=max(values.max(), 0.0))
    assert observer.range().bound == np.abs(values).max()


@given(arrays, st.floats(1, 100))
def test_a_percentile_is_exact_to_the_width_of_a_bin(parts: list[np.ndarray], percentile: float) -> None:
    observer = PercentileObserver(percentile)
    for part in parts:
        observer.see(part)
    low, high = np.concatenate(parts).min(), np.concatenate(parts).max()
    values = np.sort(np.abs(np.concatenate(parts)))
    exact = values[int(np.ceil(len(values) * percentile / 100)) - 1]
    covered = observer.range()
    assert exact * (1 - 1e-6) <= covered.bound <= exact + values[-1] / 2048 + 1e-6
    assert min(low, 0.0) <= covered.low <= 0.0 <= covered.high <= max(high, 0.0)


def test_a_percentile_clips_an_outlier() -> None:
    values = np.full(10_000, 1.0, dtype=np.float32)
    values[0] = 100.0
    observer = PercentileObserver(99.9)
    observer.see(values)
    assert 1.0 <= observer.range().high < 1.1


def test_an_observer_of_zeros_has_no_range() -> None:
    for observer in (MinMaxObserver(), PercentileObserver(99.0)):
        observer.see(np.zeros(5, dtype=np.float32))
        assert observer.range().bound == 0.0


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_a_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        PercentileObserver(percentile)


@pytest.fixture
def arrays_128(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.normal(size=(1, 3, 128, 128)).astype(np.float32) for _ in range(2)]


def test_bounds_do_not_depend_on_how_much_is_held_at_a_time(
    float_model: onnx.ModelProto, layers: list[Layer], arrays_128: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = list(dict.fromkeys(name for layer in layers[:6] for name in layer.inputs))
    whole = observe(float_model, tensors, arrays_128, MinMaxObserver, num_threads=1)
    monkeypatch.setattr(observe_module, "GROUP_BYTES", 1)
    assert observe(float_model, tensors, arrays_128, MinMaxObserver, num_threads=1) == whole
    assert list(whole) == tensors
    assert whole[INPUT].bound == max(float(np.abs(array).max()) for array in arrays_128)


def test_damaged_activations_are_named(
    float_model: onnx.ModelProto, layers: list[Layer], arrays_128: list[np.ndarray]
) -> None:
    arrays_128[0][0, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=layers[1].inputs[0]):
        observe(float_model, [layers[1].inputs[0]], arrays_128, MinMaxObserver, num_threads=1)
