"""Breaks one promise of the code after the other, and sees whether the test that holds it notices.

    python tests/mutants.py              all of them, a few seconds each
    python tests/mutants.py lanes relay  those whose promise has one of these words in it

Works on a copy of the tree in a temporary folder: the tests must pass there first, and then each must fail once its
promise is broken. Exits with 1 if one passes all the same (the mutant *survives*), or if what is to be replaced is not
in the source any more, exactly once: then the promise has moved, and its line in :data:`MUTANTS` must follow.
``tests/test_mutants.py`` looks for that in each run of the tests, which do not include this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("ft_transport", "tests", "docs", "examples", "setup.cfg", "pyproject.toml", "README.md")
# A test that hangs has noticed, too.
LIMIT = 180.0


class Mutant(NamedTuple):
    """One change of the code.

    Attributes:
        promise: What it breaks.
        file: Of the package.
        old: What is replaced, which must be there exactly once.
        new: By what.
        test: The one that must fail.
    """

    promise: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path = ROOT) -> str:
        """The file's text with the change.

        Raises:
            LookupError: What is to be replaced is not there exactly once.
        """
        text = (root / "ft_transport" / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise LookupError(f"{self.file}: {self.old.strip()!r} is there {count} times; where is this promise now?")
        return text.replace(self.old, self.new)


LANES = "tests/multiproc/test_lanes.py::"
SOURCE = "tests/lanes/test_source.py::"
DEVICE = "tests/test_device.py::"
ENDPOINT = "tests/net/test_one_sided.py::"
FABRIC = "tests/lanes/test_fabric.py::"
ONE_SIDED = "tests/multiproc/test_one_sided.py::"
CELL = "tests/multiproc/test_faults.py::test_cell"

MUTANTS = [
    Mutant(
        "what torch has cast in an optimizer's own load is put back",
        "_training/optimizers.py",
        "        return moved if is_cast else loaded\n",
        "        return loaded\n",
        "tests/training/test_optimizers.py::test_what_an_optimizers_own_load_has_torch_cast_is_put_back",
    ),
    Mutant(
        "what an optimizer's own load has made of its state stays",
        "_training/optimizers.py",
        " and same_bits(loaded, moved.to(dtype=loaded.dtype))\n",
        "\n",
        "tests/training/test_optimizers.py::test_what_an_optimizers_own_load_makes_of_its_state_stays",
    ),
    Mutant(
        "whoever ends before it was asked waits a moment for the question",
        "_lanes/control.py",
        "session, until = self.session, Deadline(_LAST_WORDS)",
        "session, until = self.session, Deadline(timedelta(0))",
        "tests/lanes/test_control.py::test_who_ends_waits_a_moment_for_something_to_refuse",
    ),
    Mutant(
        "of the state itself nothing is read before the copies are there",
        "_lanes/messages.py",
        "            return self._is_copied\n",
        "            return True\n",
        "tests/lanes/test_messages.py::test_what_is_copied_is_there_for_all_and_the_state_itself_when_all_is",
    ),
    Mutant(
        "whoever waits for a copy hears that there will be none",
        "_lanes/messages.py",
        "            self._check_copied()\n            return",
        "            return",
        "tests/lanes/test_messages.py::test_whoever_waits_for_copies_hears_why_there_are_none",
    ),
    Mutant(
        "a copy wakes up who waits for it",
        "_lanes/messages.py",
        "                with self._changed:\n                    self._changed.notify_all()\n",
        "",
        "tests/lanes/test_messages.py::test_who_waits_is_woken_by_each_copy",
    ),
    Mutant(
        "the collector comes again within a second of a long receive",
        "_telemetry/progress.py",
        "        later()\n",
        "",
        "tests/test_transport.py::test_the_collector_comes_again_in_a_call_that_lasts",
    ),
    Mutant(
        "the collector comes again when nobody comes for a state",
        "_lanes/source.py",
        "        if self._uncollected_until.expired():\n            self._collect_again()\n",
        "",
        "tests/lanes/test_source.py::test_the_collector_waits_until_the_state_is_served_but_not_for_long[False]",
    ),
    Mutant(
        "a source that has served lets go of what describes the state",
        "_lanes/serving.py",
        "                self._supplier = None  # it has the state\n",
        "",
        "tests/lanes/test_source.py::test_the_collector_waits_until_the_state_is_served_but_not_for_long[True]",
    ),
    Mutant(
        "what stays on the machine is not paced",
        "_net/listener.py",
        '        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")',
        "        pass",
        "tests/net/test_dial.py::test_nothing_paces_what_stays_on_the_machine",
    ),
    Mutant(
        "a staged message marks the replica torn",
        "_lanes/sink.py",
        "            self._note_torn(message)\n            self._landing.placement.scatter",
        "            self._landing.placement.scatter",
        LANES + "test_what_goes_through_a_bucket_tears_the_replica_too",
    ),
    Mutant(
        "a relay without digests does not splice",
        "_lanes/relay.py",
        "return self.verified",
        "return True",
        "tests/lanes/test_relay.py::test_what_nobody_could_check_is_copied_before_this_side_goes_on",
    ),
    Mutant(
        "memory that the next message will overwrite is not told by its place",
        "_lanes/supplier.py",
        "if answer.staged or not self._store.steady:",
        "if not self._store.steady:",
        "tests/lanes/test_lane.py::test_what_cannot_be_told_yet_is_told_on_its_own",
    ),
    Mutant(
        "nobody reads a process that has not shown that it is the peer's",
        "_net/cma.py",
        "if found != token:",
        "if False:",
        "tests/net/test_cma.py::test_a_token_that_is_not_there_is_no_peers",
    ),
    Mutant(
        "a new supplier begins without the damage of the one before",
        "_lanes/move.py",
        "self._sink.pending.forgive()",
        "pass",
        LANES + "test_the_source_has_no_part_in_what_a_relay_has_damaged",
    ),
    Mutant(
        "who takes memory away waits for who reads it",
        "_plan/lent.py",
        "while not self._nobody.wait_for(lambda: not self._inside, _LOOK_AGAIN_S):",
        "while False:",
        "tests/plan/test_lent.py::test_who_takes_memory_away_waits_for_who_reads_it",
    ),
    Mutant(
        "a leaf without tensors is tried whatever lands next to it",
        "_plan/rebuild.py",
        "if not leaf.views or leaves.firsts[index] not in self._targets:",
        "if leaves.firsts[index] not in self._targets:",
        "tests/test_hostile.py::test_an_array_of_objects_of_too_many_dimensions",
    ),
    Mutant(
        "a supplier bounds message numbers",
        "_lanes/supplier.py",
        "if end > len(self._store.sizes)",
        "if False",
        "tests/lanes/test_supplier.py::test_a_message_that_there_is_not_is_not_looked_for",
    ),
    Mutant(
        "how many peers wait is bounded",
        "_lanes/dispatcher.py",
        "if len(self._waiting) > ",
        "if len(self._waiting) > 100_000 + ",
        "tests/lanes/test_dispatcher.py::test_how_many_wait_is_bounded_and_the_oldest_make_room",
    ),
    Mutant(
        "a relay is drained in disallow_checkpoint",
        "_torchft/under_way.py",
        "relay.drain()",
        "pass",
        LANES + "test_a_relay_waits_for_who_fetches_from_it",
    ),
    Mutant(
        "a trickle does not outlast the deadline of who reads",
        "_net/connection.py",
        "                timer.check()  # as in write",
        "                pass",
        "tests/net/test_connection.py::test_what_goes_on_coming_has_a_deadline",
    ),
    Mutant(
        "what is as fast as it is read does not outlast the deadline of who reads",
        "_net/connection.py",
        "timer.check()  # there may be something to read each time",
        "pass  # there may be something to read each time",
        "tests/net/test_connection.py::test_what_goes_on_coming_has_a_deadline",
    ),
    Mutant(
        "how many lanes a destination opens is bounded",
        "_lanes/supplier.py",
        "len(self._lanes) >= MAX_LANES",
        "len(self._lanes) >= 1000 * MAX_LANES",
        "tests/lanes/test_supplier.py::test_how_many_lanes_a_destination_may_open_is_bounded",
    ),
    Mutant(
        "a relay keeps copies of small messages",
        "_lanes/relay.py",
        "data.clone()",
        "data",
        "tests/lanes/test_relay.py::test_small_messages_are_passed_on_as_they_came",
    ),
    Mutant(
        "failed destinations are not named as suppliers",
        "_lanes/chain.py",
        'alive = other.peer.outcome in ("pending", "complete")',
        "alive = True",
        SOURCE + "test_who_has_failed_supplies_nobody",
    ),
    Mutant(
        "a resumed receive begins torn",
        "_lanes/destination.py",
        "self._report.torn = bool(left)",
        "pass",
        LANES + "test_what_is_left_of_an_earlier_receive_is_a_mix_from_the_beginning",
    ),
    Mutant(
        "the source's deadline is told to destinations",
        "_lanes/serving.py",
        'if outcome in ("failed", "timed out")',
        'if outcome in ("failed",)',
        SOURCE + "test_the_sources_deadline_is_told",
    ),
    Mutant(
        "who goes on talking does not outlast the source's deadline",
        "_lanes/serving.py",
        "header, body = session.recv(timer)\n            timer.check()\n",
        "header, body = session.recv(timer)\n",
        SOURCE + "test_the_sources_deadline_is_told",
    ),
    Mutant(
        "an earlier visit of the same identity is cut",
        "_lanes/source.py",
        "earlier.session.connection.abort()",
        "pass",
        SOURCE + "test_whoever_comes_again_is_served_in_place_of_the_earlier_visit",
    ),
    Mutant(
        "the optimizer's hook looks at every parameter group",
        "_plan/unchanged.py",
        '"param_groups", ())',
        '"param_groups", ())[:1]',
        "tests/plan/test_unchanged.py::test_every_parameter_group_of_an_optimizer_is_seen",
    ),
    Mutant(
        "what comes from a device is there before it is sent",
        "_lanes/supplier.py",
        "        copied.finish()\n",
        "",
        DEVICE + "test_copies_of_one_message_overlap_what_the_wire_does_with_another",
    ),
    Mutant(
        "a bucket is not filled anew while a device copies from it",
        "_plan/buffers.py",
        "        self._copies.finish()\n",
        "",
        DEVICE + "test_copies_of_one_message_overlap_what_the_wire_does_with_another",
    ),
    Mutant(
        "each device that a state is on is waited for before its bytes are read",
        "_device.py",
        "    devices = _devices_of(tensors)\n    for device in devices:\n",
        "    devices = _devices_of(tensors)\n    for device in ():\n",
        DEVICE + "test_a_kernel_that_still_writes_to_the_state_is_waited_for",
    ),
    Mutant(
        "copies run in streams of a transfer's own",
        "_device.py",
        "self._own = [_seam.new_stream(device) for device in self.devices]",
        "self._own = [_seam.current_stream(device) for device in self.devices]",
        DEVICE + "test_copies_do_not_wait_for_the_step_that_training_is_in",
    ),
    Mutant(
        "an endpoint keeps what late bytes land in until it is closed",
        "_net/one_sided.py",
        "        pause, failures = _FIRST_PAUSE_S, 0\n",
        "        self._landing, pause, failures = None, _FIRST_PAUSE_S, 0\n",
        ENDPOINT + "test_closing_waits_for_nobody_and_is_done_once_it_can_be",
    ),
    Mutant(
        "an endpoint that is closed leaves a read that stands still",
        "_net/one_sided.py",
        "lambda: self._closing or work.is_completed()",
        "lambda: work.is_completed()",
        ENDPOINT + "test_closing_waits_for_nobody_and_is_done_once_it_can_be",
    ),
    Mutant(
        "an endpoint tries to close as often as it takes",
        "_net/one_sided.py",
        "            except TimeoutError:\n                pass\n",
        "            except TimeoutError:\n                break\n",
        ENDPOINT + "test_closing_waits_for_nobody_and_is_done_once_it_can_be",
    ),
    Mutant(
        "a read of NIXL's whose peer is gone has failed",
        "_net/one_sided.py",
        "    _let_reads_fail(transport)\n",
        "",
        ENDPOINT + "test_a_read_of_nixls_whose_peer_is_gone_has_failed",
    ),
    Mutant(
        "NIXL's agent ends when it is let go of",
        "_net/one_sided.py",
        "weakref.ref(agent)  #",
        "(lambda: agent)  #",
        ENDPOINT + "test_nixls_agent_ends_when_it_is_let_go_of",
    ),
    Mutant(
        "an error does not keep the read that has failed",
        "_net/one_sided.py",
        "    exc.__traceback__ = None\n",
        "    pass\n",
        ENDPOINT + "test_an_error_does_not_keep_what_has_failed",
    ),
    Mutant(
        "an endpoint that cannot be closed is kept",
        "_net/one_sided.py",
        "                    _left.append(self)\n",
        "",
        ENDPOINT + "test_a_backend_that_fails_to_close",
    ),
    Mutant(
        "who waits for an endpoint that cannot be closed is let go",
        "_net/one_sided.py",
        "                    self._let_go()  #",
        "                    #",
        ENDPOINT + "test_a_backend_that_fails_to_close",
    ),
    Mutant(
        "what an endpoint is asked while it is closed is not waited for",
        "_net/one_sided.py",
        '        if self._closing:\n            job.fail(OSError("it is closed"))\n        return job',
        "        return job",
        ENDPOINT + "test_what_is_asked_for_while_it_is_closed_is_not_waited_for",
    ),
    Mutant(
        "an endpoint does nothing any more once it is closed",
        "_net/one_sided.py",
        "            if self._closing:\n                job.fail(",
        "            if False:\n                job.fail(",
        ENDPOINT + "test_what_was_asked_for_before_it_was_closed_is_not_done",
    ),
    Mutant(
        "an endpoint registers the same memory once",
        "_net/one_sided.py",
        "if key not in self._shown:",
        "if True:",
        ENDPOINT + "test_the_same_memory_is_registered_once",
    ),
    Mutant(
        "an endpoint takes memory of another size for other memory",
        "_net/one_sided.py",
        "key = (tensor.data_ptr(), tensor.nbytes, tensor.device)",
        "key = (tensor.data_ptr(), 0, tensor.device)",
        ENDPOINT + "test_the_same_memory_is_registered_once",
    ),
    Mutant(
        "an endpoint keeps what it shows, whatever the backend does",
        "_net/one_sided.py",
        "self._shown[key] = tensor, memory,",
        "self._shown[key] = None, memory,",
        ENDPOINT + "test_what_is_shown_is_kept_until_it_is_closed",
    ),
    Mutant(
        "an endpoint keeps nothing once it is closed",
        "_net/one_sided.py",
        "        self._shown.clear()\n",
        "",
        ENDPOINT + "test_what_is_shown_is_kept_until_it_is_closed",
    ),
    Mutant(
        "an endpoint reads no more than there is room for",
        "_net/one_sided.py",
        "if nbytes > self._room:",
        "if False:",
        ENDPOINT + "test_what_fails_is_an_oserror",
    ),
    Mutant(
        "a read of an endpoint that has failed is not taken for one that has ended",
        "_net/one_sided.py",
        "            work.wait()\n",
        "",
        ENDPOINT + "test_what_fails_is_an_oserror",
    ),
    Mutant(
        "a fork leaves its parent's endpoints alone",
        "_net/one_sided.py",
        "\nos.register_at_fork(after_in_child=_leave_alone)\n",
        "\n",
        ENDPOINT + "test_a_fork_leaves_its_parents_endpoints_alone",
    ),
    Mutant(
        "memory that was exchanged is not shown by an endpoint",
        "_lanes/fabric.py",
        "        held.check()\n",
        "",
        FABRIC + "test_memory_that_was_exchanged_is_not_shown",
    ),
    Mutant(
        "memory that is gone is not shown by an endpoint",
        "_lanes/fabric.py",
        "            held.reads(lambda piece: None)  #",
        "            pass  #",
        FABRIC + "test_memory_that_is_given_back_while_it_is_looked_at_is_not_shown",
    ),
    Mutant(
        "who finds memory gone does not hold up its owner, by an endpoint",
        "_lanes/fabric.py",
        "            readers.leave()\n            raise\n",
        "            raise\n",
        FABRIC + "test_memory_that_is_given_back_while_it_is_looked_at_is_not_shown",
    ),
    Mutant(
        "who gives back what an endpoint shows waits until nobody can read it",
        "_lanes/fabric.py",
        "self._endpoint.when_closed(readers.leave)",
        "readers.leave()",
        FABRIC + "test_who_gives_back_what_is_shown_waits_until_nobody_can_read_it",
    ),
    Mutant(
        "the place that an endpoint gives fits a frame",
        "_lanes/fabric.py",
        "return place if len(place) <= _MAX_PLACE_BYTES else None",
        "return place",
        FABRIC + "test_a_place_that_fits_no_frame_is_sent",
    ),
    Mutant(
        "memory that is gone is not written to from an endpoint",
        "_lanes/fabric.py",
        "return copy if held is None else held.reads(copy)",
        "return copy",
        FABRIC + "test_a_destination_that_gives_memory_back_meanwhile_is_told",
    ),
    Mutant(
        "an endpoint that takes its time to end is not waited for without end",
        "_lanes/fabric.py",
        "if not self._endpoint.await_closed(_CLOSING):",
        "if not self._endpoint.await_closed(timedelta(days=1)):",
        FABRIC + "test_an_end_that_does_not_close_is_not_waited_for_without_end",
    ),
    Mutant(
        "a lane is not over before its endpoint shows nothing any more",
        "_lanes/session.py",
        "            shown.await_closed()\n",
        "            pass\n",
        ONE_SIDED + "test_a_source_that_ends_shuts_its_readers_out",
    ),
    Mutant(
        "that this side lives is no progress of who has stopped, with an endpoint",
        "_lanes/session.py",
        "            self.connection.nbytes_alive += HEADER_BYTES\n",
        "            pass\n",
        "tests/lanes/test_supplier.py::test_that_this_side_lives_is_no_progress_of_who_has_stopped",
    ),
    Mutant(
        "who asks again and again for an endpoint has one",
        "_lanes/supplier.py",
        "        session.end()\n        if fabric",
        "        session.hide()\n        if fabric",
        "tests/lanes/test_supplier.py::test_who_asks_for_a_fabric_again_and_again_has_one_endpoint",
    ),
    Mutant(
        "who supplies an endpoint does not fall silent when it shows no more",
        "_lanes/session.py",
        "shown = self.shown or next(reversed(self._hidden), None)",
        "shown = self.shown",
        "tests/lanes/test_session.py::test_what_cannot_be_shown_any_more_is_sent_and_its_end_not_waited_for_in_silence",
    ),
    Mutant(
        "who supplies an endpoint says that it lives",
        "_lanes/session.py",
        "            self.send(LaneFrame.WAIT, timer)\n            timer.check()\n\n\ndef _check_patience",
        "            timer.check()\n\n\ndef _check_patience",
        ONE_SIDED + "test_a_read_that_is_late_is_waited_for",
    ),
    Mutant(
        "that an endpoint's read is under way says nothing of the peer",
        "_lanes/session.py",
        "        while not job.await_done(_LOOK):\n",
        "        while not job.await_done(_LOOK):\n            timer.progressed()\n",
        "tests/lanes/test_session.py::test_a_read_that_goes_on_is_no_sign_of_life",
    ),
    Mutant(
        "who only says that it lives does not outlast an endpoint's deadline",
        "_lanes/session.py",
        "                timer.check()  # there may be something to read each time\n",
        "",
        "tests/lanes/test_session.py::test_who_says_nothing_but_that_it_lives_does_not_outlast_the_deadline",
    ),
    Mutant(
        "who was interrupted speaks to the source alone",
        "_lanes/control.py",
        "        self._heartbeats.end()  # Ctrl-C may have come just when some were about to begin\n",
        "",
        "tests/lanes/test_control.py::test_nobody_speaks_beside_one_who_was_interrupted",
    ),
    Mutant(
        "by an endpoint one message is asked for at a time",
        "_lanes/lane.py",
        "window = 1 if self.session.reader is not None and self.session.reader.waits else _WINDOW",
        "window = _WINDOW",
        ONE_SIDED + "test_a_read_that_is_late_is_waited_for",
    ),
    Mutant(
        "what an endpoint could not read is not tried by the next one",
        "_lanes/fetch.py",
        "self.unreadable |= isinstance(exc, Unreadable)",
        "pass",
        ONE_SIDED + "test_a_read_that_dies_is_fetched_over_tcp",
    ),
    Mutant(
        "a lane that ends takes its endpoint with it",
        "_lanes/lane.py",
        "        self._leave_fabric()\n        # Before it counts",
        "        # Before it counts",
        CELL + "[lanes-network-cut-move-star-one_sided]",
    ),
    Mutant(
        "one lane with an endpoint is enough",
        "_lanes/fetch.py",
        'lanes == "auto" and self._fabric not in ("", CMA)',
        "False",
        ONE_SIDED + "test_one_lane_will_do_but_for_who_has_no_other_way",
    ),
    Mutant(
        "an endpoint that does not begin is given up at the destination",
        "_lanes/lane.py",
        "timer=StallTimer(timer.deadline), limit=_fabric.OPENING)",
        "timer=StallTimer(timer.deadline))",
        ONE_SIDED + "test_a_backend_that_does_not_even_begin",
    ),
    Mutant(
        "an endpoint that does not begin is given up at the source",
        "_lanes/supplier.py",
        "partial(session.speak, timer=self._timer, limit=_fabric.OPENING)",
        "partial(session.speak, timer=self._timer)",
        ONE_SIDED + "test_a_backend_that_does_not_even_begin",
    ),
    Mutant(
        "nobody is shown by an endpoint who has another fabric",
        "_lanes/supplier.py",
        "if fabric != self._store.fabric:",
        "if False:",
        ONE_SIDED + "test_both_sides_have_a_say",
    ),
    Mutant(
        "storages are told apart where tensors begin in the middle of them",
        "_state/describe.py",
        "if not any(self.offsets) and len({*self.addresses}) == len(self.addresses):",
        "if len({*self.addresses}) == len(self.addresses):",
        "tests/state/test_describe.py::test_distant_views_of_one_storage_stay_together_but_not_what_lies_between",
    ),
    Mutant(
        "a leaf that is the same as an earlier one has its views among all",
        "_state/manifest.py",
        "            views.append(others[index].views)\n",
        "",
        "tests/state/test_manifest.py::test_a_leaf_that_is_the_same_as_an_earlier_one_is_none_of_the_plain",
    ),
    Mutant(
        "a number in a column is of something that is there",
        "_wire/decode.py",
        "if count and not 0 <= min(which) <= max(which) < len(values):",
        "if count and not max(which) < len(values):",
        "tests/wire/test_decode.py::test_numbers_of_columns_out_of_range",
    ),
    Mutant(
        "columns of too many views are refused before memory is taken",
        "_wire/decode.py",
        '    _check_count(count, "tensors")\n',
        "    expect(int, count)\n",
        "tests/wire/test_decode.py::test_more_than_accepted_is_refused_before_memory_is_taken",
    ),
    Mutant(
        "the leaves that a manifest lists come in order, each once",
        "_wire/decode.py",
        "if not done <= expect(int, index) < count:",
        "if not 0 <= expect(int, index) < count:",
        "tests/wire/test_decode.py::test_leaves_that_cannot_be",
    ),
    Mutant(
        "nil is no plain value where one is expected",
        "_plan/expected.py",
        "return [(index,) if _is_value(leaf) else (index, leaf) for index, leaf in leaves]",
        "return [(index, None if _is_value(leaf) else leaf) for index, leaf in leaves]",
        "tests/plan/test_expected.py::test_what_is_said_otherwise_of_any_leaf_is_for_who_reads_all",
    ),
    Mutant(
        "what is beside an expected tree is no leaf of it",
        "_plan/expected.py",
        "if not all(type(index) is int and _is_value(leaf) for index, leaf in beyond):",
        "if not all(type(index) is int for index, leaf in beyond):",
        "tests/plan/test_expected.py::test_what_is_otherwise_is_read_as_a_whole",
    ),
    Mutant(
        "a target that is given up takes no bytes",
        "_plan/compare.py",
        "kept = [at for at, number in enumerate(self.numbers) if number not in numbers]",
        "kept = [at for at, number in enumerate(self.numbers)]",
        "tests/plan/test_compare.py::test_targets_by_the_numbers_of_views",
    ),
    Mutant(
        "without torchft, too, it is known which leaves are torn",
        "distributed.py",
        "        attempt.landing = landing\n",
        "",
        "tests/test_distributed_groups.py::test_a_leaf_that_was_torn_stays_so_until_a_state_comes_that_has_it",
    ),
    Mutant(
        "what a group has only posted has not been on the wire",
        "_group/channel.py",
        "            self.nbytes_wire += nbytes\n",
        "            self.nbytes_wire += 2 * nbytes\n",
        "tests/group/test_channel.py::test_operations_reach_the_group",
    ),
    Mutant(
        "a check of a state says what would not be received in place",
        "_check.py",
        "        fit(manifest, template, report, copies=copies)\n",
        "",
        "tests/test_check.py::test_copies_are_named",
    ),
    Mutant(
        "a source that has another transport is refused before anything is waited for",
        "_torchft/pg.py",
        'if said != _TORCHFTS and "://" not in said:',
        "if True:",
        "tests/_torchft/test_pg.py::test_the_metadata_of_a_source_that_would_be_waited_for_in_vain",
    ),
    Mutant(
        "a replica whose source cannot describe its state is stopped in the end",
        "_plan/torn.py",
        "    return said_why and not report.torn and",
        "    return False and not report.torn and",
        "tests/plan/test_torn.py::test_a_replica_whose_source_cannot_describe_its_state_is_stopped_in_the_end",
    ),
    Mutant(
        "refusals count in a row",
        "_plan/torn.py",
        "            else:\n                self._refusals = 0\n",
        "",
        "tests/plan/test_torn.py::test_a_replica_whose_source_cannot_describe_its_state_is_stopped_in_the_end",
    ),
    Mutant(
        "a device that is late breaks a group that answers nothing",
        "_group/one_way.py",
        "        if not (isinstance(exc, PeerFailure) or channel.broken):\n            channel.abort()\n",
        "",
        "tests/group/test_one_way.py::test_what_ends_this_side_alone_breaks_the_channel",
    ),
    Mutant(
        "a template tensor without memory takes no bytes",
        "_plan/compare.py",
        "    misfits.update(mine.without_memory)\n",
        "",
        "tests/plan/test_compare.py::test_template_leaves_whose_memory_was_given_back_are_named_and_left_alone",
    ),
    Mutant(
        "targets that overlap are looked for",
        "_plan/compare.py",
        "    if not others and not targets.overlap:\n",
        "    if not others:\n",
        "tests/plan/test_compare.py::test_ties_that_begin_alike_but_run_in_another_order",
    ),
    Mutant(
        "a block of other memory than the host's is not copied by address",
        "_plan/blocks.py",
        "        self.on_host = self.on_host and all(map(seam().on_host, map(itemgetter(0), blocks)))\n",
        "",
        "tests/plan/test_blocks.py::test_blocks_on_a_device_are_not_all_on_the_host",
    ),
    Mutant(
        "between the look at tiny tensors and their copy no other thread runs",
        "_plan/blocks.py",
        "there = _if_there(memory[group], addresses[group], (into if gather else out,))",
        "there = list(_if_there(memory[group], addresses[group], (into if gather else out,)))",
        "tests/plan/test_blocks.py::test_memory_that_is_taken_away_before_any_step_is_neither_read_nor_written",
    ),
    Mutant(
        "of tiny tensors that a pipe does not take none is left out",
        "_plan/blocks.py",
        "if moved[0] < len(part) or",
        "if moved[0] < 0 or",
        "tests/plan/test_blocks.py::test_many_small_tensors_cross_whatever_the_system_has",
    ),
    Mutant(
        "what is mapped read-only is found behind a gap",
        "_plan/buffers.py",
        "_WRITABLE, _OR_BEHIND = 2, 16",
        "_WRITABLE, _OR_BEHIND = 2, 0",
        "tests/plan/test_buffers.py::test_read_only_memory_is_found_among_many_addresses",
    ),
    Mutant(
        "a message that does not begin its range is taken from where it does",
        "_plan/placement.py",
        "return block, self._layout.begins[message], self._layout.sizes[message]",
        "return block, 0, self._layout.sizes[message]",
        "tests/plan/test_placement.py::test_a_range_of_several_messages_is_cut_where_they_begin",
    ),
    Mutant(
        "two messages of a run that are staged do not share a bucket",
        "_lanes/lane.py",
        "if landings[-1].staged is not None:",
        "if False:",
        "tests/lanes/test_lane.py::test_two_that_are_staged_here_do_not_share_a_bucket",
    ),
    Mutant(
        "two messages that are staged at the supplier do not share a bucket",
        "_lanes/supplier.py",
        "        if staged:\n            self._buckets.rotate(-1)\n",
        "        self._buckets.rotate(-1)\n",
        "tests/lanes/test_lane.py::test_two_that_are_staged_there_do_not_share_a_bucket",
    ),
    Mutant(
        "a message is owed until its answer is here as a whole",
        "_lanes/protocol.py",
        "if frame is LaneFrame.MESSAGE:\n                self._answered()",
        "self._answered()",
        "tests/lanes/test_lane.py::test_an_answer_that_is_none_leaves_all_to_be_fetched",
    ),
    Mutant(
        "memory that is given back in a run is not written to",
        "_lanes/fabric.py",
        "return read if held is None else held.reads(read)",
        "return read",
        "tests/lanes/test_lane.py::test_memory_that_is_given_back_in_a_run_is_not_written_to",
    ),
    Mutant(
        "digests are said while those behind them are taken",
        "_lanes/session.py",
        "nbytes >= _SAID_BYTES or len(digests)",
        "len(digests)",
        "tests/lanes/test_lane.py::test_digests_are_said_now_and_then_and_not_when_it_is_over",
    ),
    Mutant(
        "pages that are provided ahead are not left to who writes",
        "_group/ahead.py",
        "self._landing.provide(message, ahead=True)",
        "self._landing.provide(message, ahead=False)",
        "tests/group/test_ahead.py::test_flights_are_there_in_their_order",
    ),
    Mutant(
        "memory is provided right before it is written to",
        "_lanes/session.py",
        "                if provide is not None:\n                    provide()\n",
        "",
        "tests/lanes/test_session.py::test_memory_is_provided_right_before_it_is_written_to",
    ),
    Mutant(
        "what a run still owes is fetched by others",
        "_lanes/lane.py",
        "self.session.protocol.asked.extendleft(reversed(owed))",
        "pass",
        "tests/lanes/test_lane.py::test_of_a_run_that_breaks_off_all_is_still_to_be_fetched",
    ),
    Mutant(
        "a lane that is ended reads no further in the supplier's memory",
        "_lanes/lane.py",
        'self._timer.cancel("the lane was closed")',
        "pass",
        "tests/lanes/test_lane.py::test_a_lane_that_is_ended_reads_no_further",
    ),
    Mutant(
        "nobody is asked for any number of messages",
        "_lanes/protocol.py",
        "not 0 < num <= MAX_RUN",
        "False",
        "tests/lanes/test_protocol.py::test_nobody_is_asked_for_none_or_for_any_number",
    ),
    Mutant(
        "no more lanes are opened than there are messages",
        "_lanes/fetch.py",
        "min(opening.count.number, self._most)",
        "opening.count.number",
        "tests/lanes/test_fetch.py::test_no_more_lanes_are_opened_than_there_are_messages",
    ),
]


def copy_of_the_tree(folder: Path) -> Path:
    """A copy that the tests run in."""
    root = folder / "tree"
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def passes(root: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether these tests pass in a copy of the tree, and the end of what they say.

    Raises:
        RuntimeError: They could not be run: there is no such test, or the code cannot be imported.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "--timeout=60"]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT:g} s"
    if done.returncode < 0:  # of a signal: it reads memory that is gone, say
        return False, done.stdout[-2000:]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)} cannot be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0, done.stdout[-2000:]


def is_noticed(mutant: Mutant, root: Path) -> bool:
    """Whether the test fails with the change; the copy is as before afterwards."""
    path = root / "ft_transport" / mutant.file
    before, changed = path.read_text(encoding="utf-8"), mutant.apply(root)
    path.write_text(changed, encoding="utf-8")
    try:
        return not passes(root, [mutant.test])[0]
    finally:
        path.write_text(before, encoding="utf-8")


def run(mutants: list[Mutant]) -> bool:
    """Try them all and print a table; gives whether each was noticed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = copy_of_the_tree(Path(folder))
        for mutant in mutants:
            mutant.apply(root)
        sound, said = passes(root, sorted({mutant.test for mutant in mutants}))
        if not sound:
            raise RuntimeError(f"the tests fail already:\n{said}")
        print(f"| {'promise that is broken':76} | {'file':22} | {'':8} | {'s':>4} |", flush=True)
        survivors = 0
        for mutant in mutants:
            begin = time.perf_counter()
            noticed = is_noticed(mutant, root)
            survivors += not noticed
            seconds = time.perf_counter() - begin
            verdict = "noticed" if noticed else "SURVIVES"
            print(f"| {mutant.promise:76} | {mutant.file:22} | {verdict:8} | {seconds:4.0f} |", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} noticed")
    return not survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only promises with one of these words in them")
    words = parser.parse_args().words
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.promise for word in words)]
    if not chosen:
        parser.error("no promise has one of these words in it")
    try:
        return 0 if run(chosen) else 1
    except (LookupError, RuntimeError) as exc:
        print(exc, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
