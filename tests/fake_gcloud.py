"""A stand-in for the gcloud command line tool: records calls, remembers machines, plays failures.

It works on the folder $FAKE_GCLOUD: every call is a line of ``calls.jsonl``; ``state.json`` is what exists;
``scenario.json`` says what happens:

  hosts     machines of a slice (default 2)
  waits     how often a queued resource is still waiting when it is looked at
  failures  [{"match": part of the command line, "skip": n, "times": n, "code": n, "err": text}]
  runs      how the trainer goes each time it is started: [{"polls": n, "codes": [..], "preempt": bool,
            "unreachable": [workers], "log": text}], the last again and again; a code null is a trainer that hangs
"""

import json
import os
import re
import shlex
import sys

FOLDER = os.environ["FAKE_GCLOUD"]


def read(name):
    path = os.path.join(FOLDER, name)
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)


def flag(argv, name, default=""):
    return next((a.split("=", 1)[1] for a in argv if a.startswith(f"--{name}=")), default)


def missing(name):
    fail(f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")


def planned_failure(scenario, state, line):
    for number, rule in enumerate(scenario.get("failures", [])):
        if rule["match"] in line:
            seen = state["failures"].get(str(number), 0)
            state["failures"][str(number)] = seen + 1
            if rule.get("skip", 0) <= seen < rule.get("skip", 0) + rule.get("times", 10**9):
                return rule
    return None


def make_node(state, scenario, name):
    if name in state["nodes"]:
        fail(f"ERROR: (gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: the resource '{name}' already exists")
    state["nodes"][name] = "READY"


def describe_node(state, scenario, name):
    if name not in state["nodes"]:
        missing(name)
    ends = [{"ipAddress": f"10.0.{len(name)}.{i + 2}"} for i in range(scenario.get("hosts", 2))]
    print(json.dumps({"name": name, "state": state["nodes"][name], "networkEndpoints": ends}))


def queued(argv, verb, name, state, scenario):
    if verb == "create":
        if name in state["requests"]:
            fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: '{name}' already exists")
        count = int(flag(argv, "node-count", "0"))
        nodes = [f"{flag(argv, 'node-prefix')}-{i}" for i in range(count)] or [flag(argv, "node-id")]
        state["requests"][name] = {"nodes": nodes, "waits": scenario.get("waits", 0)}
    elif name not in state["requests"]:
        missing(name)
    elif verb == "describe":
        request = state["requests"][name]
        if request["waits"] > 0:
            request["waits"] -= 1
            print(json.dumps({"state": {"state": "WAITING_FOR_RESOURCES"}}))
            return
        if not request.get("made"):
            request["made"] = True
            for node in request["nodes"]:
                make_node(state, scenario, node)
        gone = any(state["nodes"].get(node) != "READY" for node in request["nodes"])
        print(json.dumps({"state": {"state": "SUSPENDED" if gone else "ACTIVE"}}))
    elif verb == "delete":
        for node in state["requests"].pop(name)["nodes"]:
            state["nodes"].pop(node, None)


def ssh(argv, node, state, scenario):
    if state["nodes"].get(node) != "READY":
        fail("ssh: connect to host 1.2.3.4 port 22: Connection refused", 255)
    command, where = flag(argv, "command"), flag(argv, "worker")
    words = shlex.split(command.split("&&")[-1])
    workers = list(range(scenario.get("hosts", 2))) if where == "all" else [int(where)]
    runs = scenario.get("runs") or [{"codes": [0]}]
    run = runs[min(max(state["started"].get(node, 0) - 1, 0), len(runs) - 1)]
    if words[0] == "tail":
        print(run.get("log", "").rstrip())
        return
    verb = words[2]
    began = state["started"].get(node, 0) > 0
    away = [w for w in workers if w in run.get("unreachable", []) and verb == "status" and began]
    if verb == "start" and where == "all":
        state["started"][node] = state["started"].get(node, 0) + 1
        state["polls"][node] = -1
    if verb == "status" and where == "all":
        state["polls"][node] += 1
    over = state["polls"].get(node, 0) >= run.get("polls", 1)
    if verb == "status" and over and run.get("preempt"):
        for name in state["nodes"]:
            state["nodes"][name] = "PREEMPTED"
        fail("Connection to 1.2.3.4 closed by remote host.", 255)
    for worker in workers:
        code = run.get("codes", [0])[worker % len(run.get("codes", [0]))]
        if worker in away:
            continue
        elif verb == "status":
            now = f"exited {code}" if over and code is not None else "running -1"
            print(f"fm4m-status {worker} {now if began else 'none -1'}")
        elif verb == "log":
            sys.stdout.write(run.get("log", "")[int(words[4]) - 1 :])
        else:
            print({"install": "fm4m-installed", "start": "fm4m-started", "stop": "fm4m-stopped"}[verb], worker)
    if away:
        fail(f"ssh: connect to host 1.2.3.4 port 22: Connection timed out (worker {away})", 255)


def main():
    argv = sys.argv[1:]
    with open(os.path.join(FOLDER, "calls.jsonl"), "a") as file:
        file.write(json.dumps(argv) + "\n")
    scenario, state = read("scenario.json"), read("state.json")
    for key in ("nodes", "requests", "failures", "started", "polls", "zones"):
        state.setdefault(key, {})
    assert argv[:2] == ["compute", "tpus"], argv
    kind, verb, name = argv[2], argv[3], re.sub(r":.*", "", argv[5] if argv[3] == "scp" else argv[4])
    try:
        if rule := planned_failure(scenario, state, " ".join(argv)):
            fail(rule["err"], rule.get("code", 1))
        if verb == "list":
            print("\n".join(state["nodes"] if kind == "tpu-vm" else state["requests"]))
        elif kind == "queued-resources":
            queued(argv, verb, name, state, scenario)
        elif verb == "create":
            make_node(state, scenario, name)
            state["zones"][name] = flag(argv, "zone")
        elif verb == "describe":
            if state["zones"].get(name, flag(argv, "zone")) != flag(argv, "zone"):
                missing(name)
            describe_node(state, scenario, name)
        elif verb == "delete":
            if state["nodes"].pop(name, None) is None:
                missing(name)
        elif verb == "ssh":
            ssh(argv, name, state, scenario)
        elif verb == "scp":
            assert os.path.exists(argv[4]), argv[4]
    finally:
        with open(os.path.join(FOLDER, "state.json"), "w") as file:
            json.dump(state, file)


if __name__ == "__main__":
    main()
