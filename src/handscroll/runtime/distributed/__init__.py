"""One picture on many devices: a process for each, of which the first leads and the others do what it tells them.

The leader alone knows of requests, prompts, schedules, run folders and files. Whenever it comes to a network that runs
in bands, it tells all ranks the plan and the network's input (`Team.tell`), and every rank makes its band
(`banded.exchange`).
"""

from __future__ import annotations

from handscroll.runtime.distributed.team import Team

__all__ = ["Team"]
