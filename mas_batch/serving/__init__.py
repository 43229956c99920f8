"""The job's agents, resident and asked about single texts: `AgentPool`."""
