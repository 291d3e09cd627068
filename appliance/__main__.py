"""python -m appliance"""

from appliance.cli import app

app(prog_name="appliance")
