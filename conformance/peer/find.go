package peer

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// JarsVariable names the environment variable that says where the Tribes jars
// are: folders (searched with their sub-folders, so that of a Tomcat
// installation will do) or single jars, separated as in PATH.
const JarsVariable = "LONGHOUSE_TRIBES_JARS"

// ErrMissing is inside the error of [Find] on a machine without Java or
// without the jars.
var ErrMissing = errors.New("no Tribes peer on this machine")

// Packages are the Debian packages with all that is needed.
const Packages = "libtomcat10-java default-jdk-headless"

const howTo = "on Debian and Ubuntu: apt-get install --no-install-recommends " + Packages +
	"; elsewhere install a JDK and set " + JarsVariable + " to the folder of a Tomcat 10.1"

// Tools is what a peer is made of.
type Tools struct {
	// Java and Javac are the paths of the commands.
	Java, Javac string
	// Tribes holds the jars for a bare Tribes node, Tomcat those for a whole
	// server; Tomcat is empty when only the others were found.
	Tribes, Tomcat []string
}

// Find looks for the tools. Its error wraps [ErrMissing] and says what to do.
func Find() (Tools, error) {
	var t Tools
	var err error
	if t.Java, err = exec.LookPath("java"); err != nil {
		return t, fmt.Errorf("%w: java is not in PATH; %s", ErrMissing, howTo)
	}
	if t.Javac, err = exec.LookPath("javac"); err != nil {
		return t, fmt.Errorf("%w: java is there, the compiler javac is not; %s", ErrMissing, howTo)
	}
	where := filepath.SplitList(os.Getenv(JarsVariable))
	if len(where) == 0 {
		where = []string{"/usr/share/java"}
	}
	jars, err := list(where)
	if err != nil {
		return t, fmt.Errorf("%w: %s: %w", ErrMissing, JarsVariable, err)
	}
	// Names in Debian carry the major version, those of an installation don't.
	for _, names := range [][2][]string{
		{{"tomcat10-tribes.jar", "tomcat10-juli.jar"}, {"tomcat10-catalina.jar", "tomcat10-catalina-ha.jar", "tomcat10-coyote.jar",
			"tomcat10-util.jar", "tomcat10-util-scan.jar", "tomcat10-api.jar", "tomcat10-annotations-api.jar", "tomcat10-servlet-api.jar",
			"tomcat10-jni.jar", "tomcat10-jaspic-api.jar", "tomcat10-el-api.jar"}},
		{{"catalina-tribes.jar", "tomcat-juli.jar"}, {"catalina.jar", "catalina-ha.jar", "tomcat-coyote.jar", "tomcat-util.jar",
			"tomcat-util-scan.jar", "tomcat-api.jar", "annotations-api.jar", "servlet-api.jar", "tomcat-jni.jar", "jaspic-api.jar", "el-api.jar"}},
	} {
		if t.Tribes = all(jars, names[0]); t.Tribes == nil {
			continue
		}
		if more := all(jars, names[1]); more != nil {
			t.Tomcat = append(slices.Clone(t.Tribes), more...)
		}
		return t, nil
	}
	return t, fmt.Errorf("%w: no catalina-tribes.jar with tomcat-juli.jar in %v; %s", ErrMissing, where, howTo)
}

// list returns the jars in where by name; of several with one name the first.
func list(where []string) (map[string]string, error) {
	jars := map[string]string{}
	for _, w := range where {
		err := filepath.WalkDir(w, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if name := filepath.Base(path); strings.HasSuffix(name, ".jar") && jars[name] == "" {
				jars[name] = path
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return jars, nil
}

// all returns the paths of all names, or nil if one is missing.
func all(jars map[string]string, names []string) []string {
	var paths []string
	for _, n := range names {
		if jars[n] == "" {
			return nil
		}
		paths = append(paths, jars[n])
	}
	return paths
}

//go:embed java/Peer.java java/Node.java java/Values.java java/Samples.java java/Web.java
var sources embed.FS

// Program is the compiled driver.
type Program struct {
	tools Tools
	dir   string
}

// Build compiles the driver into dir. The Tomcat part is left out when its jars
// were not found.
func Build(ctx context.Context, t Tools, dir string) (*Program, error) {
	src, out := filepath.Join(dir, "src"), filepath.Join(dir, "classes")
	if err := errors.Join(os.MkdirAll(src, 0o755), os.MkdirAll(out, 0o755)); err != nil {
		return nil, err
	}
	entries, err := sources.ReadDir("java")
	if err != nil {
		return nil, err
	}
	jars := t.Tribes
	if len(t.Tomcat) > 0 {
		jars = t.Tomcat
	}
	args := []string{"-nowarn", "-d", out, "-cp", strings.Join(jars, string(os.PathListSeparator))}
	for _, e := range entries {
		if e.Name() == "Web.java" && len(t.Tomcat) == 0 {
			continue
		}
		text, err := sources.ReadFile("java/" + e.Name())
		if err != nil {
			return nil, err
		}
		path := filepath.Join(src, e.Name())
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return nil, err
		}
		args = append(args, path)
	}
	if text, err := exec.CommandContext(ctx, t.Javac, args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("peer: %s: %w\n%s", t.Javac, err, text)
	}
	return &Program{t, out}, nil
}
