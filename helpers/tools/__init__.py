"""What runs the series and looks after the machine: the notebook runner, stored outputs, the doctor, known faults.

No notebook teaches it; `python -m helpers run` and `doctor` use it. Read `runner` first.
"""
