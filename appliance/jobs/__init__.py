"""Files and batches: work that can wait, line by line, in capacity that nobody else wants.

    reader    bytes of a JSONL file -> lines, or what is wrong with them; never more than a line at a time
    planner   pure: windows, rates, when a batch will be done, what would be late and leaves the site
    files     uploads and results on disk
    store     what is known of files, batches and their lines; one thread, one transaction a step
    writer    result files that a crash cannot tear: what is not committed is cut off
    runner    one batch from validating to its end; `desk` keeps them all going

The pipeline is not known here: the composition root hands in a callable that answers lines.
"""
