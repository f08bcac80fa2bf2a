"""Jobs that are killed, stopped, started twice, or run out of disk: no finished row is lost, none is there twice, and the result is the same."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from batch_cases import batch, files_of, journal_of, manifest_of, read_rows, rows_of_all_kinds, size_of, start, wait_for_growth, write_rows

import ferrum.batch
from ferrum import BatchError

JOBS, KILLS = 5, 20
ROWS_TO_KILL = 300
ROWS = 120


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(input, flags, bytes of the output of an uninterrupted run)."""
    return uninterrupted(tmp_path_factory.mktemp("crash"), ROWS)


def uninterrupted(folder, rows):
    path = write_rows(folder / "in.jsonl", rows_of_all_kinds(rows))
    flags = ["-n", "40", "--seed", "11", "--concurrency", "4"]
    code, err, _ = batch(path, "-o", folder / "whole.jsonl", *flags)
    assert code == 0, err
    return path, flags, (folder / "whole.jsonl").read_bytes()


def check_journal(output):
    """Whole lines, each of a row of its own; a torn one at the end at most. How many rows are finished."""
    with open(journal_of(output), "rb") as file:
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    assert len(lines) - len(whole) <= 1
    rows = [json.loads(line)["row"] for line in whole]
    assert len(set(rows)) == len(rows)
    return set(rows)


def kill_again_and_again(job, output, moments):
    """Kill a job at random moments while its rows run, then let it end; how often it was killed then."""
    path, flags, whole = job
    finished, killed = set(), 0
    while killed < KILLS:
        process = start(path, "-o", output, *flags, "--resume")
        running = wait_for_growth(journal_of(output), process, size_of(journal_of(output)))
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.communicate()
        if not running or process.returncode != -signal.SIGKILL or os.path.exists(output):
            break  # it was not in the middle of its rows: the job is at its end
        killed += 1
        now = check_journal(output)
        assert finished < now, "finished rows are lost"
        finished = now
    assert len(finished) < ROWS_TO_KILL
    code, err, _ = batch(path, "-o", output, *flags, "--resume")
    assert code == 0, err
    assert f"{len(finished)} of them done before" in err
    assert output.read_bytes() == whole
    return killed


def test_jobs_killed_many_times_give_the_bytes_of_one_that_was_not(tmp_path):
    job = uninterrupted(tmp_path, ROWS_TO_KILL)
    with ThreadPoolExecutor(2) as pool:
        killed = list(pool.map(lambda number: kill_again_and_again(job, tmp_path / f"{number}.jsonl", random.Random(number)), range(JOBS)))
    assert sum(killed) == JOBS * KILLS


@pytest.mark.parametrize("code,status,name", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_keeps_what_is_finished_and_says_how_to_go_on(job, tmp_path, code, status, name):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    process = start(path, "-o", output, *flags)
    assert wait_for_growth(journal_of(output), process, 0)
    process.send_signal(code)
    _, err = process.communicate(timeout=60)
    err = err.decode()
    assert process.returncode == status, err
    done = len(check_journal(output))
    assert f"Stopped by {name}: {done} rows of {ROWS} are done and kept." in err
    counts = manifest_of(output)["counts"]
    assert (counts["done"], counts["rows"]) == (done, ROWS)
    assert files_of(output) == [".journal", ".manifest.json"]
    again = err.splitlines()[-1].removeprefix("Go on with: ").removeprefix("python -m ferrum batch ")
    assert again.endswith("--resume")
    assert batch(*again.split())[0] == 0
    assert output.read_bytes() == whole


def test_a_second_ctrl_c_ends_at_once_and_loses_no_finished_row(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    process = start(path, "-o", output, *flags)
    assert wait_for_growth(journal_of(output), process, 0)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    process.communicate()
    assert process.returncode in (-signal.SIGINT, 130)
    check_journal(output)
    assert batch(path, "-o", output, *flags, "--resume")[0] == 0
    assert output.read_bytes() == whole


def test_a_second_writer_is_refused_and_told_who_is_the_first(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    process = start(path, "-o", output, *flags)
    assert wait_for_growth(journal_of(output), process, 0)
    process.send_signal(signal.SIGSTOP)
    try:
        code, err, _ = batch(path, "-o", output, *flags, "--resume")
        assert code == 1 and f"Process {process.pid} on " in err and "is working on this output" in err
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    process.communicate()
    assert output.read_bytes() == whole


def test_a_torn_or_damaged_end_of_the_journal_is_cut_off(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    code, err, _ = batch(path, "-o", output, *flags, "--max-errors", "6")
    assert code == 1, err
    journal = open(journal_of(output), "rb").read()
    lines = journal.splitlines(keepends=True)
    last = lines[-1]
    tails = [last[:-1], last[: len(last) // 2], b"\0" * 4096, last[:20] + b"X" + last[21:], b"\n"]
    for tail in tails:
        with open(journal_of(output), "wb") as file:
            file.write(b"".join(lines[:-1]) + tail)
        code, err, _ = batch(path, "-o", output, *flags, "--max-errors", "6", "--resume")
        assert code == 1
        check_journal(output)
    assert batch(path, "-o", output, *flags, "--resume")[0] == 0
    assert output.read_bytes() == whole


def test_a_damaged_line_in_the_middle_costs_its_row_only(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    batch(path, "-o", output, *flags, "--max-errors", "6")
    lines = open(journal_of(output), "rb").read().splitlines(keepends=True)
    lines[2] = lines[2][:30] + b"#" + lines[2][31:]
    with open(journal_of(output), "wb") as file:
        file.write(b"".join(lines))
    code, err, _ = batch(path, "-o", output, *flags, "--resume")
    assert code == 0 and f"{len(lines) - 1} of them done before" in err
    assert output.read_bytes() == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 192 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_is_told(job, small_disk, tmp_path):
    path, flags, whole = job
    output = small_disk / "out.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (120 << 10))
    done = 0
    for _ in range(2):
        code, err, _ = batch(path, "-o", output, *flags, "--resume")
        assert code == 1 and os.strerror(errno.ENOSPC) in err and "go on with: " in err and "--resume" in err, err
        assert "Traceback" not in err
        finished = check_journal(output)
        assert len(finished) >= done > 0 or not done
        done = len(finished)
    ballast.unlink()
    code, err, _ = batch(path, "-o", output, *flags, "--resume")
    if code:  # room for the journal, and not for the output beside it
        assert os.strerror(errno.ENOSPC) in err
        assert files_of(output) == [".journal", ".manifest.json"] and not output.exists()
        assert len(check_journal(output)) == ROWS
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        code, err, _ = batch(path, "-o", output, *flags, "--resume")
    assert code == 0, err
    assert output.read_bytes() == whole


def test_a_limit_of_file_sizes_is_told_like_a_full_disk(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    script = "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
             "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\nfrom ferrum.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "batch", str(path), "-o", str(output), *flags, "--threads", "1"], capture_output=True, timeout=120)
    assert done.returncode == 1 and os.strerror(errno.EFBIG) in done.stderr.decode()
    check_journal(output)
    assert batch(path, "-o", output, *flags, "--resume")[0] == 0
    assert output.read_bytes() == whole


def test_a_job_that_died_between_its_last_steps_ends_as_it_would_have(job, tmp_path):
    path, flags, whole = job
    output = tmp_path / "out.jsonl"
    assert batch(path, "-o", output, *flags)[0] == 0
    manifest = manifest_of(output)
    manifest["finished"] = False
    (tmp_path / "out.jsonl.manifest.json").write_text(json.dumps(manifest))
    for there in (True, False):  # the output was renamed, but not noted; it was half written
        if not there:
            output.unlink()
            (tmp_path / "out.jsonl.part").write_bytes(whole[:1000])
        code, err, _ = batch(path, "-o", output, *flags, "--resume")
        assert code == 0, err
        assert output.read_bytes() == whole
        (tmp_path / "out.jsonl.manifest.json").write_text(json.dumps(manifest))


def test_an_input_that_changes_while_the_job_runs_is_noticed(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": f"Tom {i}"} for i in range(3)])

    def change(progress):
        if progress.rows is not None:
            write_rows(path, [{"prompt": f"Tim {i}"} for i in range(3)])

    with pytest.raises(BatchError, match="has changed while the job ran"):
        ferrum.batch.run(path, tmp_path / "out.jsonl", params={"max_tokens": 2}, progress=change, threads=1)
    assert read_rows(tmp_path / "in.jsonl")[0] == {"prompt": "Tim 0"}
