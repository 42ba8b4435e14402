"""A file of a user whose code misbehaves, in a way that is chosen by a name."""

import re

CODE = '''
import asyncio, atexit, ctypes, gc, json, os, re, resource, signal, struct, subprocess, sys, threading, time

class Rude(Exception):
    def __str__(self): raise RuntimeError("no text")
class Mute(Exception):
    def __str__(self): return 3
class Base(BaseException): pass
class Hostile:
    def __float__(self): raise KeyboardInterrupt
    def __len__(self): return 10**9
    def __iter__(self): raise SystemExit(0)
    def __eq__(self, other): raise Base
    __hash__ = None
class Floats(float):
    def __float__(self): os._exit(0)
    def __repr__(self): raise Base
    def tolist(self): raise Base
class Text(str):
    def __str__(self): raise Base
    def encode(self, *args): raise Base
class Endless:
    def __iter__(self): return self
    def __next__(self): return 1.0
class Endless_list:
    def tolist(self): return self
class Names(dict):
    def items(self): raise GeneratorExit
def lie(*args, **kwargs): return "garbage"

# --- endless: the time limit ends them

def sleep(): time.sleep(600)
def loop():
    while True: pass
def loop_all_caught():
    while True:
        try:
            while True: pass
        except BaseException: pass
def regex(): re.match(r"(a+)+$", "a" * 60 + "b")
def power(): return 9 ** 9 ** 9
def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    time.sleep(600)
def deaf_loop():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True: pass
def deep_c():
    sys.setrecursionlimit(10**9)
    def down(): return down()
    return down()
def lock():
    held = threading.Lock(); held.acquire(); held.acquire()
def thread():
    other = threading.Thread(target=time.sleep, args=(600,)); other.start(); other.join()
def read_requests(): os.read(3, 1); time.sleep(600)
def stop(): os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)
def stop_group(): os.killpg(0, signal.SIGSTOP); time.sleep(600)
def odd_reply():
    for data in (b"[1]", b'{"id": [], "value": 1}', b'{"id": 2}', b'{"id": 2, "failure": {}}', b'{"id": 3, "began": 7}',
                 b'{"id": 2, "value": {"x": 1}, "extra": 1, "metrics": 1}', b"[" * 10**5, b"\\xff", b"1" * 9999):
        for fd in range(3, 64):
            try: os.write(fd, struct.pack(">Q", len(data)) + data)
            except OSError: pass
    time.sleep(600)
def half_reply():
    for fd in range(3, 64):
        try: os.write(fd, struct.pack(">Q", 1000) + b"{")
        except OSError: pass
    time.sleep(600)
def patch_worker():
    import __main__
    __main__.Worker.reply = lie

# --- ended: their process ends, or its replies cannot be read

def end(): os._exit(0)
def shoot(): os.kill(os.getpid(), 9)
def hang_up(): os.kill(os.getpid(), signal.SIGHUP)
def terminate_group(): os.killpg(0, signal.SIGTERM); time.sleep(600)
def segfault(): ctypes.string_at(0)
def abort(): os.abort()
def close_all(): os.closerange(0, 64)
def garbage_all():
    for fd in range(3, 64):
        try: os.write(fd, b"\\0" * 64 + b"\\xff" * 4096)
        except OSError: pass
def huge_reply():
    for fd in range(3, 64):
        try: os.write(fd, b"\\xff" * 8)
        except OSError: pass

# --- raised

def leave(): sys.exit(0)
def leave_text(): sys.exit("text")
def interrupt(): raise KeyboardInterrupt
def generator_exit(): raise GeneratorExit
def base(): raise Base("base")
def cancelled(): raise asyncio.CancelledError
def stop_iteration(): raise StopIteration
def rude(): raise Rude
def mute(): raise Mute
def long_text(): raise ValueError("x" * 10**7)
def chain():
    error = None
    for _ in range(10**5):
        new = ValueError("deep"); new.__cause__ = error; error = new
    raise error
def deep(): return deep()
def exception_hook(): sys.excepthook = lie; sys.unraisablehook = lie; raise ValueError("hook")

# --- harmless: the result counts

def read_input(): return sys.stdin.read() and input()
def close_output(): sys.stdout.close(); sys.stderr.close()
def close_012():
    for fd in (0, 1, 2): os.close(fd)
def garbage_1(): os.write(1, os.urandom(2**20))
def directory(): os.chdir("/")
def signals():
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
def nice():
    os.nice(5)
def limits(): resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
def fork_end():
    if os.fork() == 0: os._exit(0)
def sleeper(): subprocess.Popen(["sleep", "601"])
def sleeper_session(): subprocess.Popen(["sleep", "601"], start_new_session=True)
def no_gc(): gc.disable(); gc.freeze()
def at_exit(): atexit.register(time.sleep, 600)
def leave_threads():
    for _ in range(20): threading.Thread(target=time.sleep, args=(600,)).start()
def print_much():
    for _ in range(200): print("x" * 2**16)
def print_hostile(): sys.stderr.write("\\x1b[2J\\x1b]0;owned\\x07"); os.write(2, b"\\xff\\xfe\\n")
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(64):
                try: os.close(fd)
                except OSError: pass
            time.sleep(601)
        os._exit(0)

# --- others: either

def dtype():
    import torch
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(7)
def alarm(): signal.setitimer(signal.ITIMER_REAL, 0.05)
def forged_reply():
    data = b'{"id": 1, "value": [1.0, 1.0], "extra": {"map": {}}, "metrics": {"map": {}}}'
    for fd in range(3, 64):
        try: os.write(fd, struct.pack(">Q", len(data)) + data)
        except OSError: pass
def memory():
    held = []
    while True: held.append(bytearray(2**26))
def environment(): os.environ.clear(); sys.path.clear(); sys.modules.pop("json")
def fork():
    os.fork()
def fork_many():
    for _ in range(6): os.fork()
def daemon_keeps_pipes():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(601)
        os._exit(0)
def busy_threads():
    def busy():
        until = time.monotonic() + 20  # the test is over then, and its worker may live on
        while time.monotonic() < until: pass
    for _ in range(3): threading.Thread(target=busy, daemon=True).start()
def patch_json(): json.dumps = lie
def patch_struct(): struct.Struct = lie; struct.pack = lie
def patch_encoder():
    import __main__
    __main__.Encoder.encode = lie
def patch_builtins():
    import builtins
    builtins.isinstance = lie; builtins.len = lie; builtins.str = lie
def patch_pickle():
    import pickle; pickle.loads = lie
def trace():
    def follow(*args): raise Base
    sys.settrace(follow)
def delete_main():
    import __main__
    vars(__main__).clear()
def kill_all_threads():
    for id in list(sys._current_frames()):
        if id != threading.get_ident():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(id), ctypes.py_object(SystemExit))

# ---


VALUES = {
    "none_at_all": lambda n: None, "number": lambda n: 1.0, "text": lambda n: "1.0", "short": lambda n: [1.0] * (n - 1),
    "empty": lambda n: [], "long": lambda n: [1.0] * (n + 1), "ten_million": lambda n: [1.0] * 10**7,
    "endless": lambda n: Endless(), "endless_list": lambda n: Endless_list(), "generator": lambda n: (x for x in iter(int, 1)),
    "nan": lambda n: [float("nan")] * n, "infinite": lambda n: [float("inf")] * n, "huge": lambda n: [10**400] * n,
    "digits": lambda n: [10**5000] * n,
    "bools": lambda n: [True] * n, "complex": lambda n: [1j] * n, "texts": lambda n: ["1"] * n, "bytes": lambda n: [b"1"] * n,
    "hostile": lambda n: [Hostile()] * n, "hostile_list": lambda n: Hostile(), "floats": lambda n: [Floats(1)] * n,
    "hostile_text": lambda n: [Text("x")] * n, "hostile_mapping": lambda n: [Names(a=1)] * n,
    "self": lambda n: [looped()] * n, "functions": lambda n: [print] * n, "types": lambda n: [int] * n,
    "nested": lambda n: [nested(10**5)] * n, "surrogates": lambda n: [{"\\ud800": 1.0}] * n,
    "keys": lambda n: [{1: 1.0, (2,): Hostile()}] * n,
}
def looped():
    value = []; value.append(value); return value
def nested(depth):
    value = []
    for _ in range(depth): value = [value]
    return value

def act(name, n=1):
    if name in VALUES: return VALUES[name](n)
    if name != "fine": globals()[name]()
    return [1.0] * n
def reward(problem, completions): return act(completions[0], len(completions))
async def reward_async(problem, completions): return act(completions[0], len(completions))
class Environment:
    """Each of its methods does what it is told."""
    def reset(self, doing="fine", **row):
        act(doing)
    def tool(self, name: str) -> str:
        """Do something.

        Args:
            name: what.
        """
        return str(act(name))
    async def asynchronous(self, name: str) -> str:
        """Do something.

        Args:
            name: what.
        """
        return str(act(name))
class Task:
    def problem(self, position, seed):
        from groupwise.types import Problem
        act(NAMES[position])
        return Problem(id="p", prompt="p", answer="a")
    def held_out(self, count): return [self.problem(0, 0)]
    def score(self, problem, completions):
        from groupwise.types import Score
        found = act(completions[0].text, len(completions))
        return [Score(reward=value) for value in found] if isinstance(found, list) else found
'''


def names(kind: str) -> list[str]:
    """Of the functions in a part of the file."""
    part = CODE.partition(f"# --- {kind}")[2].partition("# ---")[0]
    return re.findall(r"^def (\w+)", part, re.MULTILINE)


ENDLESS, ENDED, RAISED, HARMLESS, OTHERS = map(names, ("endless", "ended", "raised", "harmless", "others"))
ACTIONS = [*ENDLESS, *ENDED, *RAISED, *HARMLESS, *OTHERS]
VALUES = re.findall(r'"(\w+)": lambda n', CODE)
"""What is returned instead of a list of numbers."""
POISONED = ["alarm", "patch_encoder", "kill_all_threads", "patch_builtins", "patch_struct", "trace"]
"""After which the same process gives nothing right; the user's own calls alone are concerned."""
