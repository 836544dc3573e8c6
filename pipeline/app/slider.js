// Called at each change of the data, with the same elements: where the slider stands outlives a new mask.
export default function ({ data, parentElement }) {
  const frame = parentElement.querySelector(".frame");
  const input = frame.querySelector("input");
  for (const name of ["photo", "layer"]) {
    const picture = frame.querySelector(`.${name}`);
    if (picture.src !== data[name]) picture.src = data[name];
    picture.width = data.width;
    picture.height = data.height;
  }
  frame.querySelector(".photo").alt = data.photo_words;
  frame.querySelector(".layer").alt = data.layer_words;
  input.setAttribute("aria-label", `Left: ${data.photo_words}; right: ${data.layer_words}`);
  // As wide as there is room, and never higher than the screen.
  frame.style.maxWidth = `min(100%, calc(80vh * ${data.width / data.height}))`;
  input.oninput = () => frame.style.setProperty("--at", `${input.value}%`);
}
