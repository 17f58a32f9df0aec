"""One side's formats by short names, for tests of operations on pages; `c`: calibrated static codes."""

from quire.kernels.formats import FORMATS, Codes, KVFormat, Scales, Transform

SIDES = {
    **{name: fmt.v for name, fmt in FORMATS.items() if fmt.k.codes is fmt.v.codes},
    "int8c": KVFormat(Codes.INT8, Scales.STATIC, transform=Transform.AFFINE),
    "int4c": KVFormat(Codes.INT4, Scales.STATIC, transform=Transform.AFFINE),
}
