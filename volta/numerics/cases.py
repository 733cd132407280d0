"""List the cases."""

from __future__ import annotations

from volta.numerics.attention import Attention, Layer, Store
from volta.numerics.quantized import Dequantize, Experts, Multiply

Case = Attention | Layer | Store | Dequantize | Multiply | Experts


CASES: tuple[Case, ...] = (
    *(Attention(head_size=size, new=(1, 1, 1), old=(70, 0, 15), seed=size) for size in (64, 80, 128, 192, 256)),
    *(Attention(head_size=size, new=(37, 20), old=(0, 9), seed=size) for size in (64, 80, 128, 192, 256)),
    *(Attention(head_size=size, new=(1, 1), old=(52, 31), cache="fp8_e5m2", seed=size) for size in (64, 80, 128, 256)),
    *(Attention(head_size=size, new=(19, 1), old=(20, 45), cache="fp8_e5m2", seed=size) for size in (64, 80, 128, 256)),
    Attention(new=(1, 30, 5), old=(64, 0, 33), page=32, kv_heads=2, group=4),
    Attention(new=(1, 1), old=(64, 31), page=32, kv_heads=2, group=7),
    Attention(new=(1,), old=(300,), page=16, group=8),
    Attention(new=(1,) * 130, old=tuple(range(130)), kv_heads=1, group=1),
    Attention(new=(3, 1), old=(14, 90), group=5, cache="fp8_e5m2", scales=(0.37, 1.9)),
    Attention(new=(1, 1), old=(14, 90), group=5, cache="fp8_e5m2", scales=(0.37, 1.9), page=32),
    Attention(new=(40,), old=(50,), window=24),
    Attention(new=(1, 1), old=(90, 3), window=24),
    Attention(new=(40,), old=(50,), window=24, cache="fp8_e5m2", page=32),
    Attention(new=(40,), old=(50,), window=24, level=-40.0),
    Attention(new=(1, 1), old=(620, 3), window=24, level=-40.0),
    Attention(new=(1, 1), old=(90, 3), level=-40.0),
    Attention(new=(21, 1), old=(0, 50), alibi=True, group=4),
    Attention(new=(1, 1), old=(7, 50), alibi=True, group=4),
    Attention(new=(21, 1), old=(0, 50), softcap=5.0, spread=8.0),
    Attention(new=(1, 1), old=(7, 50), softcap=5.0, spread=8.0),
    Attention(new=(21, 1), old=(0, 50), sinks=True, window=16, group=8),
    Attention(new=(1, 1), old=(7, 50), sinks=True, group=8),
    Attention(new=(1, 17), old=(50, 33), alibi=True, softcap=30.0, window=40, cache="fp8_e5m2", group=3),
    Layer(Attention(new=(33, 1), old=(0, 0), head_size=80)),
    Layer(Attention(new=(33, 1), old=(0, 0), head_size=80, cache="fp8_e5m2")),
    Layer(Attention(new=(1, 1), old=(0, 0), head_size=128, kv_heads=2, cache="fp8_e5m2", page=32)),
    Layer(Attention(new=(20, 18), old=(0, 0), cache="fp8_e5m2", scales=(0.02, 0.013))),
    *(Store(heads=heads, head_size=size, page=page) for heads, size, page in ((2, 64, 16), (5, 80, 32), (8, 128, 16))),
    *(Store(heads=heads, head_size=size, cache="fp8_e5m2") for heads, size in ((2, 64), (5, 80), (8, 128), (1, 256))),
    Store(tokens=40, padding=(0, 7, 39), cache="fp8_e5m2", scales=(0.37, 1.9), page=32),
    Store(tokens=20, cache="fp8_e5m2", spread=1e-5),
    Store(tokens=20, cache="fp8_e5m2", spread=8000.0),
    *(Dequantize(inputs=256, outputs=72, group=group) for group in (32, 64, 128, 256)),
    Dequantize(inputs=48, outputs=8, group=48),
    *(Multiply(group=group) for group in (32, 64, 128, 256)),
    *(Multiply(parts=parts) for parts in (1, 2, 4, 16)),
    *(Multiply(rows=rows, outputs=88) for rows in (1, 7, 33)),
    Multiply(inputs=96, group=32),
    Multiply(rows=2, inputs=4096, group=128, outputs=32),
    Multiply(rows=2, inputs=4096, group=128, outputs=32, parts=1),
    *(Experts(bits=bits, zeros=zeros) for bits in (4, 8) for zeros in (False, True)),
    *(Experts(bits=bits, rows=21, group=32, outputs=72, weighted=False) for bits in (4, 8)),
    Experts(bits=4, rows=40, experts=3, top_k=1, inputs=96, group=32),
)


def worded(case: Case) -> str:
    """Return the Python expression of a case: ``Store(heads=5)``."""
    changed = {
        name: value for name, value in vars(case).items() if value != getattr(type(case)(), name) and name != "seed"
    }
    if isinstance(case, Layer):
        return f"Layer({worded(case.batch)})"
    return f"{type(case).__name__}({', '.join(f'{name}={shown(value)}' for name, value in changed.items())})"


def shown(value: object) -> str:
    """Return a value as text, shortened."""
    text = str(value).replace(" ", "")
    return text if len(text) < 30 else f"{text[:12]}…{text[-8:]}"
