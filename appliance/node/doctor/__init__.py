"""appliance doctor: facts about this machine in, findings with remedies out."""
