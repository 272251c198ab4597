#!/bin/sh
# Builds secml's own environment: secml_env.sh PYTHON3.8 FOLDER
set -eu
"$1" -m venv "$2"
"$2/bin/pip" install --quiet -r "$(dirname "$0")/secml_requirements.txt"
"$2/bin/python" -c 'import secml; print("secml", secml.__version__, "is ready")'
