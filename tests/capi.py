"""The Python class of examples/python, for tests/capi.rs:  capi.py MODEL PROMPT_FILE"""

import sys
import threading

import specache
from specache import Engine

model, prompt = sys.argv[1], open(sys.argv[2]).read()
log = []


def fails(status, words, call):
    try:
        call()
    except specache.Error as e:
        assert e.status == status and words in str(e), (e.status, str(e))
    else:
        raise AssertionError(f"no error with {words!r}")


engine = Engine(model, log=lambda level, message: log.append((level, message)), log_level=4)
assert log[0][0] == 3 and "recall" in log[0][1], log
assert "recall" in repr(engine)
ids = engine.tokenize(prompt)
assert engine.detokenize(ids) == prompt
assert engine.info.vocab_size == 1536

session = engine.session(1200, kv="specache", bits=1, top_k=16)
session.prefill(prompt)
assert session.tokens() == ids
logits = session.logits()
assert len(logits) == 1536 and abs(sum(logits)) < 1e6
fork = session.fork()
given = session.generate_ids(20, ignore_eos=True)
assert max(range(1536), key=logits.__getitem__) == given[0]
assert fork.generate_ids(20, ignore_eos=True) == given

# Fed by hand.
fork.truncate(len(ids) - 1)
fork.step(ids[-1])
for token in given:
    row = fork.logits()
    assert max(range(1536), key=row.__getitem__) == token
    fork.step(token)

# A loop that is left, and goes on.
fork.reset()
fork.prefill(ids)
pieces = fork.generate(20, ignore_eos=True)
next(pieces)
pieces.close()
fork.generate_ids(3)
assert fork.tokens()[len(ids):] == given[: len(fork.tokens()) - len(ids)]

# Another thread ends it.
fork.reserve(4000)
timer = threading.Timer(0.05, fork.cancel)
timer.start()
n = len(fork.generate_ids(10**9, ignore_eos=True))
timer.join()
assert n < 3000


# An exception of a callback comes through.
def boom(_):
    raise KeyError("mine")


try:
    fork.generate_ids(5, on_text=boom)
except KeyError:
    pass
else:
    raise AssertionError("no KeyError")

fork.sampling(temperature=0.8, seed=3)
fails(2, "temperature -1", lambda: fork.sampling(temperature=-1))
fails(2, "bits 3", lambda: engine.session(10, bits=3))
fails(3, "no such folder", lambda: Engine("/no/such/folder"))
try:
    engine.session(10, bitz=3)
except TypeError as e:
    assert "bitz" in str(e)
else:
    raise AssertionError("no TypeError")
stats = session.stats()
assert stats["steps"] == 19 and 0 < stats["hit_rate"] <= 1, stats
session.close()
fails(8, "NULL", session.tokens)
fork.close()
engine.close()
print("ok")
