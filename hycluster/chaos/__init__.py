"""``hycluster chaos``: faults on a schedule, load, and whether every answer is that of an undisturbed run."""
