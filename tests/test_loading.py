"""Bringing weights into memory before they are used, and how fast memory reads. The file is sparse: zeros that take no disk."""

import signal

import pytest
from test_shapes import write_sparse_model
from tiny_models import TinyConfig, make_vocabulary

from ferrum.errors import EngineClosed
from ferrum_native._native import Engine

MIB = 1 << 20
CONFIG = TinyConfig(layers=1, hidden=1024, experts=64, expert_ffn=1280)  # three pieces


@pytest.fixture
def file(tmp_path):
    try:
        return write_sparse_model(tmp_path / "sparse.gguf", CONFIG, make_vocabulary(CONFIG.vocab))
    except OSError as error:
        pytest.skip(f"this file system takes no sparse file: {error}")


@pytest.fixture
def engine(file):
    with Engine(file, threads=2, kv_tokens=64) as engine:
        yield engine


def known_fraction(engine):
    """The resident share of a fresh file, where the system tells."""
    fraction = engine.resident_fraction()
    if fraction == 1.0:
        pytest.skip("the system does not say which pages are in memory")
    return fraction


def test_populate_reports_every_piece_and_all_is_resident(engine, file):
    assert known_fraction(engine) < 0.1
    reports = []
    engine.populate(lambda done, total: reports.append((done, total, engine.stats()["steps"])))
    size = file.file_bytes
    assert 128 * MIB < size < 192 * MIB
    assert reports == [(64 * MIB, size, 0), (128 * MIB, size, 0), (size, size, 0)]
    assert engine.resident_fraction() == 1.0
    engine.populate()


def test_an_exception_of_progress_ends_it(engine, file):
    known_fraction(engine)

    def stop(done, total):
        raise LookupError

    with pytest.raises(LookupError):
        engine.populate(stop)
    assert engine.resident_fraction() == pytest.approx(64 * MIB / file.file_bytes, abs=0.2)
    engine.populate()
    assert engine.resident_fraction() == 1.0


def test_ctrl_c_ends_it_between_two_pieces(engine):
    known_fraction(engine)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            engine.populate()
            engine.populate()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert engine.resident_fraction() < 1.0
    engine.prefill(0, [1, 2])


def test_an_engine_closed_on_the_way_says_so(engine):
    with pytest.raises(EngineClosed):
        engine.populate(lambda done, total: engine.close())
    for call in (engine.populate, engine.resident_fraction, engine.measure_bandwidth, engine.measure_product_rate, engine.profile, engine.reset_profile):
        with pytest.raises(EngineClosed):
            call()


def test_warm_up_populates(engine):
    known_fraction(engine)
    engine.warm_up()
    assert engine.resident_fraction() == 1.0


def test_the_bandwidth_of_memory_is_a_rate(engine):
    logits = engine.prefill(0, [1, 2, 3]).copy()
    rate = engine.measure_bandwidth()
    assert 1e8 < rate < 1e14
    assert 1e7 < engine.measure_product_rate() < 1e15
    engine.release(0)
    assert engine.prefill(0, [1, 2, 3]).copy().tobytes() == logits.tobytes()
