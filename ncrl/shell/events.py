"""Curves for TensorBoard, written by this thread, so that a full disk is an ordinary `OSError`.

The writers of torch and TensorBoard write in a thread of their own, which ends with a traceback.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class CurveWriter:
    """An event file of what is shown over steps.

    What earlier files of the folder hold from `first_step` on is withdrawn. All methods raise
    OSError if the disk refuses.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        # TensorBoard reads in the order of names; the clock may have been set back.
        name = max([name, *(f"{file.name}.1" for file in folder.glob("events.out.tfevents.*"))])
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self.write(Summary(value=[Summary.Value(tag=name, simple_value=value)]), step)

    def write(self, summary: Summary, step: int) -> None:
        """What is shown at a step."""
        self._write(Event(step=step, summary=summary))

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()  # what finds no room now is written when there is some
