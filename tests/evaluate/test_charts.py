import struct

from pipelines.charts import draw_nll, draw_routing


def _size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_draws_both_matrices(tmp_path):
    nll = {f"arm {i}": {"law": 2.0 + i, "code": 3.0} for i in range(3)}
    routing = {"law": {"anchor": 0.25, "acme": 0.75}, "code": {"anchor": 1.0, "acme": 0.0}}
    small = _size(draw_nll(nll, tmp_path / "nll.png", title="Loss"))
    nll |= {f"more {i}": {"law": 2.0, "code": 3.0} for i in range(6)}
    large = _size(draw_nll(nll, tmp_path / "more.png", title="Loss"))
    assert large[0] == small[0]
    assert large[1] > small[1]
    _size(draw_routing(routing, tmp_path / "routing.png", title="Routing"))


def test_a_constant_matrix_can_be_drawn(tmp_path):
    width, height = _size(draw_nll({"anchor": {"law": 2.0}}, tmp_path / "one.png", title="Loss"))
    assert min(width, height) > 0
