"""Runs the Autobahn test suite against a node, and judges what it saw of one that does not echo.

Autobahn expects of a server that it sends every message back. A device of ours logs in with its first message and is sent
nothing of its own, so that three kinds of cases remain, and each has what has to be seen:

- no message is due (frames that break the protocol, pings, closes): Autobahn's own verdict, where our error message before
  the close is no deviation;
- the message is due back: the node has read all of it, and says that it is no login (1008), is binary (1003) or too long (1009);
- compression: the node does not negotiate it, "unimplemented".
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

LIMIT = 4096  # the longest message of a device, bytes
CASES = 517


def without_error(received):
    """What was received before our error message, and whether there was one."""
    if received and received[-1][0] == "message" and not received[-1][2]:
        text = received[-1][1]
        # The report cuts long ones, and writes their keys in an order of its own.
        if '"code":414' in text:
            return received[:-1], True
    return received, False


def of_limits(case):
    """The close code that a case about large messages (9.x) has to end with: without expectations in its report."""
    group = int(case.split(".")[1])
    if group % 2 == 0:
        return 1003
    return 1008 if group == 7 else 1009


def flaw(case, result):
    """What is wrong with a case's result; None if nothing is."""
    kind, code = case.split(".")[0], result["remoteCloseCode"]
    if kind in ("12", "13"):
        return None if result["behavior"] == "UNIMPLEMENTED" and code == 1000 else "compression was negotiated"
    if kind == "9":
        return None if code == of_limits(case) else f"closed with {code} instead of {of_limits(case)}"
    wanted = list(result["expected"].values())
    echoes = [event for event in wanted[-1] + wanted[0] if event[0] == "message"]
    before, was_told = without_error(result["received"])
    if not echoes:
        if result["behaviorClose"] not in ("OK", "INFORMATIONAL"):
            return f"closed with {code}: {result['resultClose']}"
        if was_told != (code in (1002, 1003, 1007) and not result["localCloseCode"] == code):
            return f"an error message: {was_told}, with the close code {code}"
        return None if before in wanted else f"received {before}"
    # What is long is cut in the report: its length is in the description, or in what was sent, headers included.
    told = re.search(r"payload of length (\d+)", result["description"])
    sent = sum(int(size) * count for size, count in result["txOctetStats"].items())
    is_long = sent > 2 * LIMIT or told is not None and int(told[1]) > LIMIT
    due = 1003 if echoes[0][2] else 1009 if is_long else 1008
    if code != due or not was_told:
        return f"closed with {code} instead of {due}"
    pongs = [event for event in wanted[-1] if event[0] == "pong"]
    return None if before == pongs else f"received {before} before"


def main():
    python2, wstest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        reports = pathlib.Path(folder)
        settings = {"outdir": folder, "cases": ["*"], "exclude-cases": [], "exclude-agent-cases": {}}
        settings["servers"] = [{"agent": "node", "url": os.environ["CLIENTS_URL"]}]
        (reports / "settings.json").write_text(json.dumps(settings))
        command = [python2, wstest, "--mode", "fuzzingclient", "--spec", str(reports / "settings.json")]
        with open(reports / "log", "w") as log:
            status = subprocess.run(command, stdout=log, stderr=log, cwd=folder, timeout=900, check=False).returncode
        results = {}
        for path in reports.glob("node_case_*.json"):
            result = json.loads(path.read_text())
            results[result["id"]] = result
        if status != 0:
            print((reports / "log").read_text()[-500:])
    groups = {}
    for case in sorted(results, key=lambda case: [int(part) for part in case.split(".")]):
        wrong = flaw(case, results[case])
        right = groups.setdefault(int(case.split(".")[0]), [0, 0])
        right[0 if wrong is None else 1] += 1
        if wrong is not None:
            print(f"FAIL    autobahn: {case}: {wrong}"[:300])
    for group, (passed, failed) in groups.items():
        if failed == 0:
            print(f"ok      autobahn: {group}.*: {passed} cases")
    failed = sum(failed for _, failed in groups.values())
    if len(results) != CASES:
        failed += 1
        print(f"FAIL    autobahn: {len(results)} cases of {CASES}, exit code {status}")
    print(f"autobahn 25.10.1: {sum(passed for passed, _ in groups.values())} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main())
