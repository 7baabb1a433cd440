"""MLPerf LoadGen as the referee: the same model, driven by it and by kdbench, by turns.

The model waits as long as its tensor says and computes nothing, so that what is judged is the two
ways to drive and to count, not what else this machine does.
"""

import contextlib
import re
import statistics
import threading
import time

import numpy as np
import pytest

loadgen = pytest.importorskip("mlperf_loadgen", reason="the extra loadgen brings it")

pytestmark = pytest.mark.slow

REPEATS = 5
SECONDS = 3.0


class Waiting:
    """A runtime whose runs take 4 to 14 ms, by the first pixel's code."""

    instances = 4
    double_buffer = False
    late = 0

    def open_instance(self, *, double_buffer):
        return self

    def run(self, source, target):
        time.sleep(0.004 + 1e-4 * int(source.flat[0]))

    def close(self):
        pass


@pytest.fixture
def driven(bundle, monkeypatch):
    """A bundle, the model, and tensors for 4 to 14 ms."""
    monkeypatch.syspath_prepend("deploy")
    from kdbench_bundle import open_bundle

    opened = open_bundle(bundle.folder)
    spec = opened.inputs
    tensors = np.zeros((50, 1, 3, 16, 16), np.float32)
    codes = np.random.default_rng(0).permutation(np.arange(50) * 2)
    tensors[:, 0, 0, 0, 0] = (codes - spec.zero_point) * spec.scale
    return opened, Waiting(), tensors


def run_loadgen(scenario, issue, folder, count, rate=1.0):
    """Run LoadGen; its summary as text."""
    settings = loadgen.TestSettings()
    settings.scenario = scenario
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(SECONDS * 1000)
    settings.min_query_count = 100
    settings.offline_expected_qps = rate
    log = loadgen.LogSettings()
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    sut = loadgen.ConstructSUT(issue, lambda: None)
    qsl = loadgen.ConstructQSL(count, count, lambda samples: None, lambda samples: None)
    folder.mkdir()
    try:
        loadgen.StartTestWithLogSettings(sut, qsl, settings, log)
    finally:
        loadgen.DestroyQSL(qsl)
        loadgen.DestroySUT(sut)
    return (folder / "mlperf_log_summary.txt").read_text()


def done(sample):
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])


def read(summary, words):
    return float(re.search(rf"{words}\s*:\s*([\d.e+]+)", summary)[1])


def test_single_stream_p90_is_within_five_percent_of_loadgens(driven, tmp_path):
    from kdbench_figures import summary
    from kdbench_instance import Instance
    from kdbench_load import Minima, single_stream

    bundle, runtime, tensors = driven
    ratios, bounds = [], []
    with Instance(bundle, runtime) as instance:

        def issue(samples):
            for sample in samples:
                instance.query(tensors[sample.index])
                done(sample)

        for repeat in range(REPEATS):
            text = run_loadgen(
                loadgen.TestScenario.SingleStream, issue, tmp_path / f"s{repeat}", len(tensors)
            )
            stream = single_stream(instance, tensors, Minima(SECONDS, 100, 1))
            ours = summary(stream.all_ns, "tensor to logits", "host-emulation")
            ratios.append(1e6 * ours["p90"] / read(text, r"90.00 percentile latency \(ns\)"))
            bounds.append(text)
    print("p90, kdbench / LoadGen:", [round(ratio, 3) for ratio in ratios])
    assert abs(statistics.median(ratios) - 1) < 0.05
    assert all("arly" in text for text in bounds)


def test_offline_throughput_is_within_five_percent_of_loadgens(driven, tmp_path):
    from kdbench_instance import Instance
    from kdbench_load import Minima, offline

    bundle, runtime, tensors = driven
    ratios = []
    with contextlib.ExitStack() as stack:
        team = [stack.enter_context(Instance(bundle, runtime)) for _ in range(runtime.instances)]

        def issue(samples):
            queue = iter(samples)
            lock = threading.Lock()

            def work(instance):
                while True:
                    with lock:
                        sample = next(queue, None)
                    if sample is None:
                        return
                    instance.query(tensors[sample.index])
                    done(sample)

            threads = [threading.Thread(target=work, args=(instance,)) for instance in team]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        rate = 100.0
        for repeat in range(REPEATS):
            flood = offline(bundle, runtime, tensors, Minima(SECONDS, 1, 1), double_buffer=False)
            rate = flood.frames / flood.seconds
            text = run_loadgen(
                loadgen.TestScenario.Offline, issue, tmp_path / f"o{repeat}", len(tensors), rate
            )
            ratios.append(rate / read(text, "Samples per second"))
    print("frames/s, kdbench / LoadGen:", [round(ratio, 3) for ratio in ratios])
    assert abs(statistics.median(ratios) - 1) < 0.05
