"""A pair of nodes that do not reach each other and a sum that is wrong are named."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ray_ds.verify import group_member
from ray_ds.verify.collectives import judge_pairs, judge_sums, no_group
from ray_ds.verify.group_member import GroupMember


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> GroupMember:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(group_member, "CONNECT_TIMEOUT_S", 0.5)
    return GroupMember("gloo")


def test_who_listens_is_reached(member: GroupMember) -> None:
    place = member.listen(2)
    pairs = {"a": member.reach({"b": place})}
    assert judge_pairs(pairs) == [] and pairs["a"]["b"]["seconds"] < 0.5


def test_a_closed_port_names_the_pair_and_the_port(member: GroupMember) -> None:
    address, ports = member.listen(1)
    with socket.create_server((address, 0)) as closed:
        port = closed.getsockname()[1]
    (problem,) = judge_pairs({"a": member.reach({"b": (address, [*ports, port]), "c": (address, ports)})})
    assert problem.wrong.startswith(f"a does not reach b: port {port}: ") and "firewall" in problem.action


def test_a_port_that_swallows_everything_times_out(member: GroupMember) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never greets, as a middlebox does
        (problem,) = judge_pairs({"a": member.reach({"b": ("127.0.0.1", [silent.getsockname()[1]])})})
    assert "timed out" in problem.wrong


def test_another_program_on_the_port_is_told_apart(member: GroupMember, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_as_another(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.sendall(b"SSH-2.0-other")

    monkeypatch.setattr(group_member, "_greet", answer_as_another)
    (problem,) = judge_pairs({"a": member.reach({"b": member.listen(1)})})
    assert "another program answers" in problem.wrong


@pytest.fixture
def group(tmp_path: Path, member: GroupMember) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield member
    dist.destroy_process_group()


def test_right_sums_are_right(group: GroupMember) -> None:
    facts = group.add_up()
    assert judge_sums("gloo", {"a": facts}) == [] and len(facts["wrong_elements"]) == 3


def test_wrong_sums_name_the_rank(group: GroupMember, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(values: torch.Tensor) -> None:
        values[7] += 1

    monkeypatch.setattr(dist, "all_reduce", corrupt)
    (problem,) = judge_sums("gloo", {"10.0.0.7 rank 0": group.add_up()})
    assert problem.wrong.startswith("gloo added up wrong on 10.0.0.7 rank 0: 1 elements of 1024")


def test_a_group_that_does_not_form_names_the_variable() -> None:
    assert "GLOO_SOCKET_IFNAME" in no_group("gloo", "timeout").action
    assert "NCCL_SOCKET_IFNAME" in no_group("nccl", "timeout").action and "timeout" in no_group("nccl", "timeout").wrong
