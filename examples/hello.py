"""Hello, workflow: one run saves a file, a second one mounts and reads it.

Run it with: spellq workflow "python hello.py"
"""

import spell.client

client = spell.client.from_environment()


def run_to_the_end(**options):
    """Launch a worker run, wait until it has ended, and insist that its command went well."""
    run = client.runs.new(**options)
    print(f"Run {run.id}: {run.command}")
    run.wait_status(*client.runs.FINAL)
    run.refresh()
    if run.status != client.runs.COMPLETE or run.user_exit_code != 0:
        raise SystemExit(f"Run {run.id} ended {run.status} ({run.user_exit_code}).")
    return run


writer = run_to_the_end(command="echo 'Hello from another run!' > greeting.txt")
reader = run_to_the_end(
    command="cat /mnt/greeting.txt",
    attached_resources={f"runs/{writer.id}/greeting.txt": "/mnt/greeting.txt"},
)

for entry in reader.logs():
    if entry.status == client.runs.RUNNING and not entry.status_event:
        print(f"Run {reader.id} read: {entry.log}")

print("That is a whole workflow. Welcome!")
