package objects

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Location tells where a bucket is.
type Location struct {
	// Dir is the directory of a bucket that is one; then the other fields are empty.
	Dir string

	Bucket string
	// Prefix begins all keys; "" or with a "/" at its end.
	Prefix string
	// Endpoint is the URL of the S3 server, without a path.
	Endpoint string
	Region   string
	// PathStyle puts the bucket's name into the path instead of the host name.
	PathStyle bool
}

// Defaults of a location.
const (
	defaultEndpoint = "https://s3.amazonaws.com"
	defaultRegion   = "us-east-1"
)

// bucketName matches names of buckets as S3 has them, without dots, which do not fit into certificates.
var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$`)

// ParseURL returns the location that a URL names: "s3://bucket/prefix?endpoint=…&region=…&path_style=true", of which
// only the bucket is needed, or "file:///directory". Credentials do not belong there, since URLs are shown.
func ParseURL(text string) (Location, error) {
	u, err := url.Parse(text)
	if err != nil {
		return Location{}, errors.New("it is not a URL") // the error has the text
	}
	if u.User != nil || u.Fragment != "" || u.Opaque != "" {
		return Location{}, errors.New("it has a user, a password or a fragment, which do not belong there")
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" || u.RawQuery != "" || !filepath.IsAbs(u.Path) || filepath.Clean(u.Path) == "/" {
			return Location{}, errors.New("it must be file:// and an absolute path")
		}
		return Location{Dir: filepath.Clean(u.Path)}, nil
	case "s3":
		return parseS3(u)
	}
	return Location{}, errors.New("it must begin with s3:// or file://")
}

func parseS3(u *url.URL) (Location, error) {
	l := Location{Bucket: u.Host, Prefix: strings.Trim(u.Path, "/"), Endpoint: defaultEndpoint, Region: defaultRegion}
	if !bucketName.MatchString(l.Bucket) {
		return l, fmt.Errorf("%q is not the name of a bucket: 3 to 63 of a-z, 0-9 and -", l.Bucket)
	}
	if l.Prefix != "" {
		if checkKey(l.Prefix) != nil || len(l.Prefix) > maxKey/2 {
			return l, fmt.Errorf("%.80q is not a prefix: letters, digits and ._-/ only", l.Prefix)
		}
		l.Prefix += "/"
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return l, errors.New("what follows its ? cannot be read")
	}
	for name, values := range query {
		value := values[0]
		switch {
		case len(values) > 1:
			return l, fmt.Errorf("it has %s twice", name)
		case name == "endpoint":
			l.Endpoint, err = parseEndpoint(value)
		case name == "region" && value != "":
			l.Region = value
		case name == "path_style":
			if l.PathStyle, err = strconv.ParseBool(value); err != nil {
				err = errors.New("path_style must be true or false")
			}
		default:
			return l, fmt.Errorf("it has %.40q, but takes only endpoint, region and path_style", name)
		}
		if err != nil {
			return l, err
		}
	}
	return l, nil
}

// parseEndpoint returns an endpoint with a scheme, https by default.
func parseEndpoint(text string) (string, error) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" ||
		u.Scheme != "https" && u.Scheme != "http" {
		return "", errors.New("its endpoint must be http:// or https://, a host and, if it needs one, a port")
	}
	return u.Scheme + "://" + u.Host, nil
}
