"""``python -m ft_transport.bench``: transports side by side, turn by turn, on the same state, every byte checked.

One rank serves a state, the others receive it. For each state and mode (fresh, or in place) the transports take
turns: in every round each moves the state once, in an order balanced over the rounds, so that whatever else the
machine does hits all of them alike. What bounds them takes turns, too. Round 0 warms up and is not counted, though it
is checked; a cold run has no such round, and new processes for each turn.

==============  =================================================================================
``plan.py``     what is to be run: options, cases, turns
``states.py``   the states that are moved
``check.py``    whether what arrived is what was sent, bit for bit, and where it landed
``subjects.py`` the transports behind one interface
``limits.py``   what bounds them, behind the same
``measure.py``  memory and bytes on the wire
``worker.py``   one rank: takes the turns of one case
``run.py``      starts the ranks, watches over them, goes on when one of them dies or hangs
``results.py``  what was seen, medians and ratios
``growth.py``   states from small to large, and what was fitted to them
``table.py``    the results to read, ``plot.py`` to look at
==============  =================================================================================
"""
