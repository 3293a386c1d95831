"""The parts of ``recover.py``.

``cluster`` starts, kills and hears the replica processes; ``story`` says what happened to them and
whether it ended well; ``show`` and ``picture`` put that on the terminal and on paper. In a replica
process, ``replica`` talks to the parent, ``training`` trains, ``transports`` measures the heal.
"""
