package channeltest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// namedTest matches a folder of the repository, or the name of a test.
var namedTest = regexp.MustCompile("`([a-z/]+)`|((?:Test|Fuzz)[A-Za-z0-9]+)")

// CoveredBy checks a table of the README in the test's folder, whose third and
// last column names tests and, before them, their folders: each row names one at
// least, and all are there. The table is the one below that heading; title is the
// first cell of its head, and rows how many it has at least.
func CoveredBy(t testing.TB, heading, title string, rows int) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(readme), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("the README has no part %q", heading)
	}
	table, _, _ = strings.Cut(table, "\n## ")
	read := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], " ---") || cells[1] == " "+title+" " {
			continue
		}
		read++
		found, code := 0, ""
		for _, m := range namedTest.FindAllStringSubmatch(cells[3], -1) {
			if m[1] != "" {
				code = testsIn(t, m[1])
				continue
			}
			if found++; !strings.Contains(code, "\nfunc "+m[2]+"(") {
				t.Errorf("%s:%s is not there", strings.TrimSpace(cells[1]), m[2])
			}
		}
		if found == 0 {
			t.Errorf("%s names no test", strings.TrimSpace(cells[1]))
		}
	}
	if read < rows {
		t.Errorf("%d rows were read", read)
	}
}

// testsIn returns the code of all tests in a folder beside the test's.
func testsIn(t testing.TB, folder string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(b)
	}
	return code.String()
}
