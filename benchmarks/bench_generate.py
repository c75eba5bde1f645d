"""SmolLM2-135M-Instruct Q4_1: prefill of 512 and decode of 64 after 8, beside its rivals.

Every engine has a process of its own, the same token ids and the same threads; rounds take them in
turn, medians are reported.
"""

import statistics
import time
from contextlib import ExitStack

import torch

from tilewright.bench.peers import Peer, available, smollm2

PREFILL, PROMPT, NEW = 512, 8, 64
OURS = "tilewright, "
REST_SECONDS = 0.3  # OpenMP threads spin a while after a job: let them sleep before the next's turn


def _ids(count):
    """Token ids that no tokenizer has to be asked for: plain words' in a 49152-entry vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(300, 40000, (count,), generator=generator).tolist()


def measure(quick):
    rounds = 2 if quick else 9
    threads = torch.get_num_threads()
    model = smollm2()
    jobs = {"prefill": (_ids(PREFILL), 0), "decode": (_ids(PROMPT), NEW)}
    seconds = {job: {} for job in jobs}
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(e, model, threads)) for e in available()]
        for turn in range(-1, rounds):  # round -1 warms up
            for job, (ids, count) in jobs.items():
                for peer in peers[max(turn, 0) % len(peers) :] + peers[: max(turn, 0) % len(peers)]:
                    reply = peer.ask("generate", ids, count)
                    if turn >= 0:
                        seconds[job].setdefault(peer.engine, []).append(reply[f"{job}_seconds"])
                    time.sleep(REST_SECONDS)
    work = {"prefill": PREFILL, "decode": NEW}
    rows = []
    for job, engines in seconds.items():
        speed = {e: work[job] / statistics.median(times) for e, times in engines.items()}
        for engine, times in engines.items():
            rows.append(
                {
                    "job": f"{job} of {work[job]}" + (f" after {PROMPT}" * (job == "decode")),
                    "engine": engine,
                    "tokens_per_second": speed[engine],
                    "slowest": work[job] / max(times),
                    "fastest": work[job] / min(times),
                    "ours_over_it": {}
                    if engine.startswith(OURS)
                    else {
                        us.removeprefix(OURS).split()[0]: speed[us] / speed[engine]
                        for us in speed
                        if us.startswith(OURS)
                    },
                    "rounds": rounds,
                }
            )
    return rows
