"""What the program shows in a terminal: a pseudo-terminal, and a screen that reads its output."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time

import pytest

from emulation import BINARY

# Longer than anything here takes on any machine, so only what hangs fails.
PATIENCE_S = 300

ENDLESS = """
name: endless
device: cpu
data: {dir: data, block_size: 32, batch_size: 8}
model: {n_layer: 2, n_head: 2, n_embd: 32}
train: {steps: 1000000, eval_every: 0, save_every: 0}
"""

SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>78]|\x1b\][^\x07]*\x07")


class Terminal:
    """A program in a terminal of its own, and the screen that it draws."""

    def __init__(self, words, folder, rows, columns, **environment):
        self.bytes = b""
        self.resize_to = (rows, columns)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            variables |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment}
            # The size is set before the program asks for it.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execvpe(words[0], [str(word) for word in words], variables)

    def resize(self, rows, columns):
        self.resize_to = (rows, columns)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.kill(self.pid, signal.SIGWINCH)

    def type(self, text):
        os.write(self.fd, text.encode())

    def read(self):
        """Takes up what was written; whether the program may write more."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            more = os.read(self.fd, 1 << 16)
        except OSError:  # nobody has the terminal open any more
            return False
        self.bytes += more
        return bool(more)

    def screen(self):
        """The lines that a person sees now."""
        rows, columns = self.resize_to
        lines = [[" "] * columns for _ in range(rows)]
        y = x = at = 0
        text = self.bytes.decode(errors="replace")
        while at < len(text):
            if found := SEQUENCE.match(text, at):
                at = found.end()
                numbers = [
                    int(number or 1) for number in (found[1] or "").split(";") if "?" not in number
                ]
                if found[2] == "H":
                    y, x = [*numbers, 1, 1][0] - 1, [*numbers, 1, 1][1] - 1
                elif found[2] == "J" or (found[2] == "h" and found[1] == "?1049"):
                    lines = [[" "] * columns for _ in range(rows)]
                continue
            letter, at = text[at], at + 1
            if letter == "\r":
                x = 0
            elif letter == "\n":
                y += 1
            else:
                if 0 <= y < rows and 0 <= x < columns:
                    lines[y][x] = letter
                x += 1
        return ["".join(line).rstrip() for line in lines]

    def until(self, what, event):
        """Waits until the event has happened, and returns what it returns."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            alive = self.read()
            if found := event():
                return found
            assert alive, f"ended before {what}: {self.bytes[-2000:]!r}"
        raise AssertionError(f"no {what}:\n" + "\n".join(self.screen()))

    def shows(self, *parts):
        def all_there():
            screen = "\n".join(self.screen())
            return screen if all(part in screen for part in parts) else None

        return self.until(f"{parts} on the screen", all_there)

    def end(self):
        """Waits for the end, and returns the exit code, or 128 and the signal."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                while self.read() and select.select([self.fd], [], [], 0)[0]:
                    pass
                self.pid = None
                return code if code >= 0 else 128 - code
        raise AssertionError("it goes on:\n" + "\n".join(self.screen()))

    def close(self):
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(folder):
    """Starts programs in terminals; they end with the test."""
    opened = []

    def start(*words, rows=24, columns=80, **environment):
        opened.append(Terminal(words, folder, rows, columns, **environment))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sample's data folder."""
    path = tmp_path_factory.mktemp("sample") / "data"
    words = [BINARY, "-q", "prepare", "--source", "sample", "--tokenizer", "bpe:512", "--out", path]
    subprocess.run(words, check=True)
    return path


@pytest.fixture
def folder(tmp_path, data):
    """A folder with a configuration and data."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "endless.yaml").write_text(ENDLESS)
    return tmp_path


def train(folder, *more):
    words = [BINARY, "train", "--config", "endless.yaml", "--run-dir", "run", *more]
    return [*words]


def steps(folder):
    path = folder / "run/train.csv"
    return max(path.read_text().count("\n") - 1, 0) if path.exists() else 0


@pytest.fixture
def training(folder):
    """A run that goes on while the test looks at it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        train(folder), cwd=folder, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        end = time.monotonic() + PATIENCE_S
        while steps(folder) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        yield process
        process.kill()


def test_watch_draws_a_run_that_goes_on_and_leaves_it_alone(folder, terminal, training):
    for leave in ["q", "\x03", "\x1b"]:
        watch = terminal(BINARY, "watch", "run")
        first = watch.shows("run: running", "training loss", "tokens/s", "q leaves", "left")
        number = int(re.search(r"step (\d+) of 1000000", first)[1])

        def further(watch=watch, number=number):
            now = re.search(r"step (\d+) of 1000000", "\n".join(watch.screen()))
            return now and int(now[1]) > number

        watch.until("a later step", further)
        watch.type(leave)
        assert watch.end() == 0
        # The screen and the cursor are as before.
        assert b"\x1b[?1049l" in watch.bytes and b"\x1b[?25h" in watch.bytes
        assert training.poll() is None
    before = steps(folder)
    end = time.monotonic() + PATIENCE_S
    while steps(folder) <= before:
        assert time.monotonic() < end, "the run stands still"
        time.sleep(0.02)


def test_watch_follows_the_size_of_the_terminal_and_the_end_of_the_run(terminal, training):
    watch = terminal(BINARY, "watch", "run", rows=30, columns=120)
    screen = watch.shows("run: running", "ranks").splitlines()
    # Wide enough for the ranks to have a column of their own.
    assert any("loss" in line and "ranks" in line for line in screen), "\n".join(screen)
    watch.resize(12, 40)
    watch.bytes = b""
    small = watch.shows("run: running", "q leaves").splitlines()
    assert not any("loss" in line and "ranks" in line for line in small), "\n".join(small)
    watch.resize(2, 10)
    watch.resize(24, 80)
    watch.bytes = b""
    watch.shows("run: running", "tokens/s")
    training.kill()
    watch.shows("run: killed")
    watch.type("q")
    assert watch.end() == 0


def test_watch_gives_the_terminal_back_when_it_is_ended(terminal, training):
    watch = terminal(BINARY, "watch", "run")
    watch.shows("run: running")
    os.kill(watch.pid, signal.SIGTERM)
    assert watch.end() == 143
    assert b"\x1b[?1049l" in watch.bytes and b"\x1b[?25h" in watch.bytes
    # A terminal on which nothing can be drawn gets one picture.
    plain = terminal(BINARY, "watch", "run", TERM="dumb")
    assert plain.end() == 0
    assert b"run: running" in plain.bytes and b"\x1b" not in plain.bytes


COLOUR = re.compile(rb"\x1b\[[\d;]*(?:3[0-7]|9[0-7]|[34]8;)[\d;]*m")


def test_no_color_is_kept_to(folder, terminal, training):
    for variables, coloured in [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)]:
        watch = terminal(BINARY, "watch", "run", **variables)
        watch.shows("run: running")
        watch.type("q")
        assert watch.end() == 0
        assert bool(COLOUR.search(watch.bytes)) == coloured, variables
        refused = terminal(BINARY, "runs", "data", **variables)
        assert refused.end() == 0
        assert b"holds no run" in refused.bytes
        assert bool(COLOUR.search(refused.bytes)) == coloured, variables


def test_tables_fit_the_terminal(folder, terminal, training):
    shutil.copytree(
        folder / "run", folder / "runs/a-long-name-of-a-run-with-many-words", dirs_exist_ok=True
    )
    for columns in [20, 40, 80]:
        table = terminal(BINARY, "runs", columns=columns)
        assert table.end() == 0
        lines = table.bytes.decode().splitlines()
        assert len(lines) == 2 and all(len(line) <= columns for line in lines), lines
        assert "a-long" in lines[1]


def test_training_shows_a_bar_that_fits_and_says_the_time_left(terminal, folder):
    # So few that the bar draws all of them: later on it leaves out what comes faster than the eye.
    short = ["--set", "train.steps=4", "--set", "train.eval_every=2"]
    for columns in [100, 30]:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shown = terminal(*train(folder, *short), columns=columns)
        assert shown.end() == 0, shown.bytes
        # Rows are filled with spaces, so that the terminal goes on in the next one.
        # Lines of the log begin with a time, dimmed.
        texts = re.split(r"[\r\n]|\x1b\[\d*[A-Z]|\x1b\[2m", shown.bytes.decode())
        rows = [
            text[at : at + columns]
            for text in texts
            if "/4 steps" in text
            for at in range(0, len(text.rstrip()), columns)
        ]
        assert rows and all(
            re.match(r"\d+/4 steps(, | +)|evaluating: \d+/", row) for row in rows
        ), rows
        assert any(row.startswith("evaluating: ") for row in rows), rows
        assert any("█" in row for row in rows) == (columns == 100), rows
        assert columns == 30 or any(" left" in row for row in rows), rows


def test_quiet_training_shows_nothing_and_logs_all_the_same(terminal, folder):
    shown = terminal(*train(folder, "--set", "train.steps=5", "-q"))
    assert shown.end() == 0
    assert shown.bytes == b""
    log = (folder / "run/logs/rank-0000.log").read_text()
    assert "step" in log and "parameters" in log


def test_bash_completes_verbs_and_options(terminal, folder):
    script = subprocess.run([BINARY, "completions", "bash"], check=True, capture_output=True)
    (folder / "completions.bash").write_bytes(script.stdout)
    link = folder / "bin"
    link.mkdir()
    (link / "lockstep").symlink_to(BINARY)
    path = f"{link}:{os.environ['PATH']}"
    shell = terminal("bash", "--norc", "--noprofile", "-i", PATH=path, PS1="$ ", columns=200)
    shell.shows("$")
    shell.type("source ./completions.bash; echo sourced=$?\r")
    shell.shows("sourced=0")
    for typed, completed in [
        ("lockstep tr\t", "lockstep train "),
        ("lockstep eval --sp\t", "lockstep eval --split "),
    ]:
        shell.bytes = b""
        shell.type(typed)
        shell.until(completed, lambda completed=completed: completed.encode() in shell.bytes)
        shell.type("\x15")  # forget the line
    shell.type("exit\r")
    assert shell.end() == 0


def test_watch_ends_with_its_terminal(terminal, folder, training):
    """Also as a child of nohup or of a service, which leave SIGHUP ignored."""
    view = terminal("sh", "-c", f"trap '' HUP; exec {BINARY} watch run")
    view.shows("tokens/s")
    os.close(view.fd)
    view.fd = os.open(os.devnull, os.O_RDONLY)
    end = time.monotonic() + PATIENCE_S
    while not (ended := os.waitpid(view.pid, os.WNOHANG))[0]:
        assert time.monotonic() < end
        time.sleep(0.05)
    view.pid = None
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_completions(folder, shell):
    if not shutil.which(shell):
        pytest.skip(f"NOT RUN: no {shell} here")
    script = subprocess.run([BINARY, "completions", shell], check=True, capture_output=True)
    path = folder / "completions"
    path.write_bytes(script.stdout)
    subprocess.run([shell, "-n", path], check=True)
