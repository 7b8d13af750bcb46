"""Clips as jobs that are never lost: what was acknowledged is on disk, and is made exactly once in effect.

    create ──> queued ──claim──> in_progress ──complete──> completed
                  ^  │               │  │                      │
                  │  │   release,    │  │                      │
                  │  │  lease over   │  │                      │
                  └──┼───────────────┘  │                      │
                     │                  │                      │
                  cancel      fail, cancel, attempts over      │
                     │                  │                      │
                     └────> failed <────┘                      │
                              │                                │
       delete, from any state └───────────> deleted <──────────┘

| step | who may take it |
|---|---|
| create, cancel, delete | the owner alone; to anybody else there is no such job |
| claim | any worker, when the job is available: queued and not pausing, or running with a lease that is over |
| heartbeat, complete, fail, release | the worker with the job's last lease token; all others are fenced off (LeaseLost) |
| attempts over | claim, of a job whose lease is over for the third time |

completed and failed are ends: only their owner's delete follows. A deleted job is nobody's: its row stays for a while, empty,
as a cursor of pages. A lease that is over but was not taken by anybody is still its worker's.
"""
