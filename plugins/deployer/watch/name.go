package watch

import (
	"errors"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// archiveName is what a file name says: the context path and the version.
type archiveName struct{ path, version string }

var errName = errors.New(`the file name gives no context path: write "shop.war", "a#b.war" for /a/b, "shop##2.war" for version 2, or "ROOT.war"`)

// parseName reads the name of a file in the watched folder. ok is false for
// files that are no archives, err is for archives with an unusable name.
func parseName(file string) (n archiveName, ok bool, err error) {
	ext := filepath.Ext(file)
	if strings.HasPrefix(file, ".") || !strings.EqualFold(ext, ".war") && !strings.EqualFold(ext, ".zip") {
		return n, false, nil
	}
	base, version, _ := strings.Cut(strings.TrimSuffix(file, ext), "##")
	if !plainText(base) || !plainText(version) {
		return n, true, errName
	}
	if base == "ROOT" {
		return archiveName{"", version}, true, nil
	}
	for part := range strings.SplitSeq(base, "#") {
		if part == "" || part == "." || part == ".." {
			return n, true, errName
		}
	}
	return archiveName{"/" + strings.ReplaceAll(base, "#", "/"), version}, true, nil
}

// plainText reports whether s may stand in a path that users type.
func plainText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) || strings.ContainsRune(`/\?;%`, r)
	})
}
